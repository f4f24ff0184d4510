"""Bottleneck adapters against their closed form, written out around the modules of Hugging Face's own blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny_models import changed, hf_inputs, hf_llava, logits, make, randomise, state_of
from torch import Tensor, nn

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners import BottleneckAdapter, LoRA
from vlmpeft.tuners.bottleneck import parameter_count
from vlmpeft.tuners.bottleneck_layers import Bottleneck

D, K = 32, 6


KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])


class Block(nn.Module):
    """A pre-norm block: h + attention(norm(h)), then h + mlp(norm(h)); its attention returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_attn, self.mlp = Pair(), nn.Linear(D, D)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(hidden=self.norm_1(hidden))[0]
        return hidden + self.mlp(self.norm_2(hidden))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(D, D)

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return self.o_proj(hidden), "weights"


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_a_block_gives_the_closed_form_and_its_gradients(activation: Any, placement: Any) -> None:
    torch.manual_seed(0)
    model = hf_llava()
    block = model.model.language_model.layers[0] = Block()
    tuned = tune(model, [BottleneckAdapter(K, placement, activation)])
    randomise(tuned.trainable())
    x = torch.randn(2, 5, D)
    act = {"relu": torch.relu, "gelu": nn.functional.gelu}[activation]

    def adapted(module: Any, hidden: Tensor) -> Tensor:
        if not isinstance(module, Bottleneck):
            return hidden
        inner = act(hidden @ module.down.weight.T + module.down.bias)
        return hidden + inner @ module.up.weight.T + module.up.bias

    def closed(hidden: Tensor) -> Tensor:
        attention = block.self_attn.base_layer if placement == "houlsby" else block.self_attn
        hidden = hidden + adapted(block.self_attn, attention.o_proj(block.norm_1(hidden)))
        return hidden + adapted(block.mlp, block.mlp.base_layer(block.norm_2(hidden)))

    parameters = [p for name, p in tuned.trainable().items() if ".layers.0." in name]
    assert len(parameters) == (8 if placement == "houlsby" else 4)
    results = []
    for function in (block, closed):
        out = function(x)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append([out, *torch.autograd.grad((out * weights).sum(), parameters)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    if placement == "houlsby":
        assert block.self_attn(hidden=x)[1] == "weights"


@KINDS
@pytest.mark.parametrize(("placement", "modules"), [("houlsby", 4), ("pfeiffer", 2)])
def test_what_it_trains_is_what_the_formula_says(kind: str, placement: Any, modules: int, language_dir: Path) -> None:
    model, _ = make(kind, language_dir)
    tuned = tune(model, [BottleneckAdapter(K, placement)])
    assert sum(p.numel() for p in tuned.trainable().values()) == parameter_count(D, K, modules)
    assert parameter_count(D, K, modules) == modules * (2 * D * K + D + K)


@KINDS
@pytest.mark.parametrize("order", [("lora", "bottleneck"), ("bottleneck", "lora")])
def test_it_stands_with_lora_in_either_order(kind: str, order: tuple[str, str], language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    state = state_of(model)
    every: dict[str, Any] = {"lora": LoRA(2), "bottleneck": BottleneckAdapter(K)}
    tuned = tune(model, {name: every[name] for name in order})
    assert sum("lora_A" in name for name in tuned.trainable()) == 14  # every linear of the blocks, none of the adapters
    randomise({name: tuned.trainable()[name] for name in sorted(tuned.trainable())})
    logits(model, inputs)
    tuned.remove()
    assert not changed(state, model)


def test_it_acts_on_the_vision_tower() -> None:
    model, inputs = hf_llava(), hf_inputs()
    before = logits(model, inputs)
    tuned = tune(model, [BottleneckAdapter(K, part="vision")])
    assert sum(p.numel() for p in tuned.trainable().values()) == parameter_count(16, K, 4)
    assert logits(model, inputs).equal(before)
    randomise(tuned.trainable())
    assert not logits(model, inputs).equal(before)


def test_what_cannot_be_done_is_said() -> None:
    model = hf_llava()
    tuned = tune(model, [BottleneckAdapter(K)])
    with pytest.raises(ModelError, match=r"M556.*cannot be merged: its activation"):
        tuned.merge()
    with pytest.raises(ModelError, match=r"M552.*already carries"):
        tune(model, [BottleneckAdapter(K)])
    with pytest.raises(ModelError, match=r"M550.*no block in projector"):
        tune(hf_llava(), [BottleneckAdapter(K, part="projector")])
    for options, key in (
        ({"dim": 0}, "dim"),
        ({"placement": "both"}, "placement"),
        ({"activation": "tanh"}, "activation"),
    ):
        with pytest.raises(ConfigError, match=f"bottleneck.{key}"):
            BottleneckAdapter(**options)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_blocks_without_a_module_for_their_mlp_are_refused_whole(placement: Any) -> None:
    """Half of the adapters would be another method than the one asked for."""
    model = FAMILIES["opt"]({"vocab_size": 100})
    parts = Parts(nn.Identity(), nn.Identity(), model, model.lm_head, list(model.model.decoder.layers), 99)
    with pytest.raises(ModelError, match=r"M550.*(no module for their MLP|called one of mlp)"):
        BottleneckAdapter(placement=placement).apply(model, parts)
    assert not any(isinstance(m, Bottleneck) for m in model.modules())


def test_a_module_that_adds_the_residual_itself_is_refused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(D, D)

        def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
            return residual + self.dense(hidden)

    model = hf_llava()
    model.model.language_model.layers[1].mlp = Residual()
    with pytest.raises(ModelError, match=r"M551.*layers.1.mlp adds to the residual stream by itself"):
        tune(model, [BottleneckAdapter(K)])
    assert not any(isinstance(m, Bottleneck) for m in model.modules())
