"""LoftQ: nearer to the whole weights than QLoRA in every layer, as peft computes it, on any quantised base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from peft.utils import loftq_utils
from quant_models import EIGHT, NF4, quantised_layers, quantised_vlm
from runs import make_bundle, some_logits
from tiny_models import logits, our_inputs, our_vlm, randomise
from torch import Tensor
from transformers import AutoModelForCausalLM

import vlmpeft
from vlmpeft import tune
from vlmpeft.checkpoint import save
from vlmpeft.config import load_recipe
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.preflight import check_recipe
from vlmpeft.quant import QuantConfig
from vlmpeft.quant_weight import plain_weight
from vlmpeft.tuners import LoRA
from vlmpeft.tuners.lora_layers import LoftQLinear
from vlmpeft.vlm import VLM

R = 8
CONFIGS = {"nf4": NF4, "fp4": QuantConfig(4, type="fp4", compute="fp32"), "int8": EIGHT}
EACH = pytest.mark.parametrize("bits", CONFIGS)


@pytest.fixture
def wide(wide_dir: Path) -> Path:
    return wide_dir


def quantised(wide: Path, config: QuantConfig, keep: bool = True) -> VLM:
    return quantised_vlm(wide, config, keep=keep)


def loftq_layers(model: Any) -> dict[str, LoftQLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoftQLinear)}


def whole_weight(wide: Path, name: str) -> Tensor:
    weight: Tensor = our_vlm(wide).get_parameter(f"{name}.weight").detach()
    return weight


@EACH
def test_every_layer_starts_nearer_to_the_whole_weights_than_without_it(bits: str, wide: Path) -> None:
    plain = quantised_layers(quantised(wide, CONFIGS[bits]))
    off: dict[int, list[float]] = {}
    for iterations in (1, 4):
        model = quantised(wide, CONFIGS[bits])
        tune(model, [LoRA(R, init="loftq", loftq_iterations=iterations)])
        layers = loftq_layers(model)
        assert layers.keys() == plain.keys()
        for name, layer in layers.items():
            whole = whole_weight(wide, name)
            start = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
            distance = torch.linalg.matrix_norm(whole - plain_weight(layer) - start).item()
            off.setdefault(iterations, []).append(distance)
            assert distance < 0.97 * torch.linalg.matrix_norm(whole - plain_weight(plain[name])).item()
    assert sum(off[4]) < sum(off[1])


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_base_and_factors_are_those_of_peft(
    bits: int, iterations: int, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft's function computes on a GPU by name; here its moves end on the CPU."""
    model = quantised(wide, QuantConfig(4, double=False, compute="fp32") if bits == 4 else EIGHT)
    tune(model, [LoRA(R, 1.0 * R, init="loftq", loftq_iterations=iterations)])
    for kind in (torch.Tensor, bitsandbytes.nn.Params4bit):
        move = kind.to

        def to(self: Any, *args: Any, _move: Any = move, **kwargs: Any) -> Any:
            changed = {k: "cpu" if v == "cuda" else v for k, v in kwargs.items()}
            return _move(self, *("cpu" if a == "cuda" else a for a in args), **changed)

        monkeypatch.setattr(kind, "to", to)
    for name, layer in loftq_layers(model).items():
        base, a, b = loftq_utils.loftq_init(whole_weight(wide, name), bits, R, iterations)
        torch.testing.assert_close(plain_weight(layer), base, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.lora_B.weight @ layer.lora_A.weight, b @ a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 3])
@EACH
def test_it_trains_and_leaves_the_quantised_base_bit_for_bit(bits: str, iterations: int, wide: Path) -> None:
    model, given = quantised(wide, CONFIGS[bits]), our_inputs()
    before = logits(model, given)
    tuned = tune(model, [LoRA(R, init="loftq", loftq_iterations=iterations)])
    with tuned.disable():
        assert logits(model, given).equal(before) == (iterations == 1)  # or else the base is quantised for the adapter
    assert {name.rsplit(".", 2)[1] for name in tuned.trainable()} == {"lora_A", "lora_B"}
    optimizer = torch.optim.Adam(tuned.trainable().values(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(ModelError, match="M557"):
        tuned.merge()
    tuned.remove()
    assert logits(model, given).equal(before)


@pytest.mark.parametrize("iterations", [1, 2])
def test_it_comes_back_quantised_and_as_an_update_of_the_whole_weights(
    iterations: int, tiny_recipe: Path, language_dir: Path, tmp_path: Path
) -> None:
    own = (f"stages.instruct.tuners.lora.{key}" for key in ("init=loftq", f"loftq_iterations={iterations}"))
    bundle = make_bundle(tiny_recipe, "quant.bits=4", "quant.compute=fp32", *own)
    randomise(bundle.tuned.trainable())
    save(bundle, tmp_path / "final")
    loaded = vlmpeft.load(tmp_path / "final", device="cpu")
    assert some_logits(loaded).equal(some_logits(bundle))
    folder = tmp_path / "final" / "adapters" / "lora"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(language_dir), folder).eval()
    whole = vlmpeft.load(tmp_path / "final", device="cpu", quantised=False)
    assert not quantised_layers(whole.model)
    ids = {"input_ids": torch.arange(10, 30).view(2, 10)}
    torch.testing.assert_close(logits(whole.model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    for name, layer in loftq_layers(bundle.model).items():
        learned = layer.lora_B.weight @ layer.lora_A.weight - layer.start_B @ layer.start_A
        whole_layer: Any = whole.model.get_submodule(name)
        torch.testing.assert_close(whole_layer.delta(), layer.scale * learned, rtol=1e-5, atol=1e-5)


def test_what_it_needs_is_said(wide: Path, tiny_recipe: Path) -> None:
    with pytest.raises(ModelError, match=r"M551.*not quantised.*quant.bits=4"):
        tune(our_vlm(wide), [LoRA(R, init="loftq")])
    with pytest.raises(ModelError, match=r"M551.*keep_originals=True"):
        tune(quantised(wide, NF4, keep=False), [LoRA(R, init="loftq")])
    with pytest.raises(ConfigError, match=r"C102.*loftq_iterations"):
        LoRA(init="loftq", loftq_iterations=0)
    with pytest.raises(ConfigError, match=r"C102.*stage instruct: tuner 'lora' has init=loftq.*quant.bits"):
        check_recipe(load_recipe(str(tiny_recipe), ["stages.instruct.tuners.lora.init=loftq"]))


def test_originals_are_kept_until_they_are_used_and_no_longer(wide: Path) -> None:
    model = quantised(wide, NF4)
    assert all("original_weight" in vars(layer) for layer in quantised_layers(model).values())
    tune(model, [LoRA(R, init="loftq")])
    assert not any("original_weight" in vars(layer) for layer in quantised_layers(model).values())
