"""BitFit: what a bias of the base would become if it were trained in place, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import changed, hf_inputs, hf_llava, logits, our_inputs, our_vlm, randomise, state_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.parts import parts_of
from vlmpeft.tuners import BitFit, Full, LoRA
from vlmpeft.tuners.substitute import Retrained
from vlmpeft.vlm import VLM


def with_biases(dtype: torch.dtype = torch.float32) -> VLM:
    """A VLM whose language model has biases on every linear layer of its blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attention_bias=True, mlp_bias=True, initializer_range=0.1, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    language = LlamaForCausalLM(config)
    randomise({n: p for n, p in language.named_parameters() if n.endswith("bias")})
    ours: Any = hf_llava()  # for its small parts
    vision, projector = ours.model.vision_tower, nn.Linear(16, 32)
    return VLM(Vision(vision), projector, language.to(dtype)).eval()


class Vision(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.tower(pixels).last_hidden_state[:, 1:]
        return out


def text() -> dict[str, Tensor]:
    ids = torch.arange(5, 13)[None]
    return {"input_ids": ids, "labels": ids}


def test_one_step_gives_what_training_the_biases_in_place_gives() -> None:
    ours, theirs = with_biases(), with_biases()
    tuned = tune(ours, [BitFit()])
    theirs.requires_grad_(False)
    biases = {n: p for n, p in theirs.language.named_parameters() if n.endswith("bias")}
    for bias in biases.values():
        bias.requires_grad_(True)
    assert sum(p.numel() for p in tuned.trainable().values()) == sum(p.numel() for p in biases.values())
    for model, parameters in ((ours, tuned.trainable().values()), (theirs, biases.values())):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            model(**text()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(ours, text()), logits(theirs, text()), rtol=1e-6, atol=1e-6)
    tuned.merge_and_unload()
    for name, parameter in ours.language.named_parameters():
        torch.testing.assert_close(parameter, theirs.language.get_parameter(name), rtol=1e-6, atol=1e-6)


def test_it_starts_as_the_untouched_model_and_leaves_it_bit_for_bit() -> None:
    model, inputs = with_biases(), text()
    state, before = state_of(model), logits(model, inputs)
    tuned = tune(model, [BitFit()])
    assert logits(model, inputs).equal(before)
    randomise(tuned.trainable())
    adapted = logits(model, inputs)
    assert not adapted.equal(before)
    with tuned.disable():
        assert logits(model, inputs).equal(before)
    tuned.merge()
    assert logits(model, inputs).equal(adapted)
    with tuned.disable():
        assert logits(model, inputs).equal(before)
    tuned.unmerge()
    assert logits(model, inputs).equal(adapted)
    tuned.remove()
    assert not changed(state, model)


def test_on_a_bf16_model_small_updates_are_kept_and_outputs_stay_bf16() -> None:
    model = with_biases(torch.bfloat16)
    before = logits(model, text())
    tuned = tune(model, [BitFit()])
    assert {p.dtype for p in tuned.trainable().values()} == {torch.float32}
    assert logits(model, text()).equal(before)
    model(**text()).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tuned.trainable().values())
    bias = next(iter(tuned.trainable().values()))
    old = bias.detach().clone()
    with torch.no_grad():
        bias.mul_(1 + 1e-4)  # far below a bf16 step, 0.4 %
    assert not bias.equal(old)


def test_every_bias_of_the_vision_tower_trains_norms_and_all() -> None:
    model, inputs = hf_llava(), hf_inputs()
    expected = {n for n, _ in parts_of(model).vision.named_parameters() if n.endswith("bias")}
    tuned = tune(model, [BitFit("vision")])
    names = {n.removeprefix("model.vision_tower.").replace(".trained.", ".") for n in tuned.trainable()}
    assert names == expected
    before = logits(model, inputs)
    randomise(tuned.trainable())
    assert not logits(model, inputs).equal(before)


def test_torchs_attention_is_held_as_a_whole() -> None:
    torch.manual_seed(0)
    model: Any = hf_llava()
    block = model.model.language_model.layers[0] = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(8, 2, batch_first=True)}
    )
    tuned = tune(model, [BitFit()])
    assert set(tuned.trainable()) == {
        f"model.language_model.layers.0.attn.trained.{n}" for n in ("in_proj_bias", "out_proj_bias")
    }
    randomise(tuned.trainable())
    x = torch.randn(1, 3, 8)
    adapted = block["attn"](x, x, x, need_weights=False)[0]
    tuned.merge_and_unload()
    assert isinstance(block["attn"], nn.MultiheadAttention)
    assert block["attn"](x, x, x, need_weights=False)[0].equal(adapted)


@pytest.mark.parametrize("order", [("bitfit", "lora"), ("lora", "bitfit")])
def test_it_stands_with_lora_on_the_same_layers(order: tuple[str, str]) -> None:
    model, inputs = with_biases(), text()
    state = state_of(model)
    every: dict[str, Any] = {"bitfit": BitFit(), "lora": LoRA(2)}
    tuned = tune(model, {name: every[name] for name in order})
    assert sum("lora_A" in n for n in tuned.trainable()) == sum(n.endswith("bias") for n in tuned.trainable()) == 14
    randomise(tuned.trainable())
    adapted = logits(model, inputs)
    tuned.merge()
    assert (logits(model, inputs) - adapted).abs().max() <= 1e-5
    tuned.unmerge()
    assert logits(model, inputs).equal(adapted)
    tuned.remove()
    assert not changed(state, model)


def test_a_model_without_biases_is_refused_with_what_to_use_instead(language_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"M551.*language has no biases to train.*norm, ia3 or lora.*part=vision"):
        tune(our_vlm(language_dir), [BitFit()])
    assert our_inputs()
    with pytest.raises(ConfigError, match=r"bitfit.part"):
        BitFit("langauge")


def test_full_tuning_of_the_same_part_is_a_conflict() -> None:
    for tuners in ({"bitfit": BitFit(), "full": Full("language")}, {"full": Full("language"), "bitfit": BitFit()}):
        model = with_biases()
        with pytest.raises(ModelError, match=r"M552.*bias would train, but another tuner stands for it"):
            tune(model, tuners)
        assert not any(isinstance(m, Retrained) for m in model.modules())
