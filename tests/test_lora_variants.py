"""LoRA+, LoRA-FA, PiSSA and the orthogonal start, against peft and closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft_twins import (
    assert_same,
    base_linear,
    inputs,
    peft_layer,
    share,
)
from safetensors.torch import load_file
from tiny_models import hf_llava, our_inputs, our_vlm, randomise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vlmpeft import tune
from vlmpeft.drift import Drift
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.optim import adamw, parameter_groups, set_lr
from vlmpeft.tuners import LoRA
from vlmpeft.tuners.lora_init import orthogonal_
from vlmpeft.tuners.lora_layers import LoRALinear, PiSSALinear

R = 4
ADAPTER = "adapters/it/adapter_model.safetensors"
VARIANTS = [LoRA(R, init="pissa"), LoRA(R, init="pissa", rslora=True), LoRA(R, freeze_a=True), LoRA(R, lr_ratio=8.0)]


def test_pissa_starts_and_learns_as_that_of_peft() -> None:
    ours = PiSSALinear(base_linear(), R, 2.0, 0.0)
    theirs: Any = peft_layer(LoraConfig(r=R, lora_alpha=2 * R, init_lora_weights="pissa", target_modules=["0"]))
    a, b = ours.lora_A.weight, ours.lora_B.weight
    torch.testing.assert_close(b @ a, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight)
    with torch.no_grad():  # the same step from the same start, whatever sign the singular vectors have
        for mine, other in ((a, theirs.lora_A["default"].weight), (b, theirs.lora_B["default"].weight)):
            mine.add_(torch.linspace(-0.3, 0.3, mine.numel()).view(mine.shape))
            other.copy_(mine)
    start = (ours.start_A.requires_grad, ours.start_B.requires_grad)
    assert start == (False, False)
    assert_same(ours, theirs, inputs())


def test_the_start_of_pissa_is_the_best_approximation_of_its_rank() -> None:
    layer = PiSSALinear(base_linear(), R, 3.0, 0.0)
    weight = layer.weight
    left = torch.linalg.svdvals(weight - 3.0 * layer.start_B @ layer.start_A)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(left[: len(values) - R], values[R:])  # Eckart-Young: what is left are the smaller ones
    assert left[len(values) - R :].max() < 1e-5


def test_pissa_is_saved_as_a_lora_of_twice_the_rank_that_plain_lora_reads(language_dir: Path, tmp_path: Path) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, {"it": LoRA(R, init="pissa")})
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    assert {t.shape[0] for k, t in load_file(tmp_path / ADAPTER).items() if "lora_A" in k} == {2 * R}
    plain = our_vlm(language_dir)
    tune(plain, {"it": LoRA(2 * R, 4.0 * R)}).load(tmp_path)
    torch.testing.assert_close(plain(**our_inputs()).logits, model(**our_inputs()).logits, rtol=0, atol=1e-5)


def test_a_rank_above_that_of_the_weight_is_refused_by_pissa(language_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"M551.*r=64.*at most 32"):
        tune(our_vlm(language_dir), [LoRA(64, init="pissa")])


def test_a_folder_of_peft_for_a_changed_base_is_refused(language_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(language_dir)
    config = LoraConfig(r=R, lora_alpha=2 * R, init_lora_weights="pissa", target_modules="all-linear")
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"M554.*pissa"):
        tune(our_vlm(language_dir), [LoRA(R)]).load(tmp_path)


def test_drift_of_pissa_is_the_distance_of_the_whole_weight(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, [LoRA(R, init="pissa", targets=("q_proj",))])
    drift = Drift(tuned, 0.5)
    assert drift.add_gradient().item() == pytest.approx(0.0, abs=1e-6)
    randomise(tuned.trainable())
    layers = [m for m in model.modules() if isinstance(m, PiSSALinear)]
    penalty = 0.25 * sum((layer.delta().square().sum() for layer in layers), torch.zeros(()))
    expected = torch.autograd.grad(penalty, list(tuned.trainable().values()))
    model.zero_grad()
    assert drift.add_gradient().item() == pytest.approx(penalty.item(), rel=1e-4)
    for parameter, gradient in zip(tuned.trainable().values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_the_orthogonal_start_is_that_of_peft_and_its_product_is_zero() -> None:
    theirs: Any = peft_layer(LoraConfig(r=R, init_lora_weights="orthogonal", target_modules=["0"]))
    layer = LoRALinear(base_linear(), R, 2.0, 0.0)
    torch.manual_seed(7)
    theirs.orthogonal_init("default")
    torch.manual_seed(7)
    orthogonal_(layer.lora_A.weight, layer.lora_B.weight)
    assert layer.lora_A.weight.equal(theirs.lora_A["default"].weight)
    assert layer.lora_B.weight.equal(theirs.lora_B["default"].weight)
    assert layer.lora_B.weight.any()
    assert layer.delta().abs().max() < 1e-6


def saved_for_backward(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for backward, each storage once, without parameters."""
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    out.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_a_keeps_its_product_alone_for_backward(dtype: torch.dtype) -> None:
    tokens, d_in = 50, 512
    x = torch.randn(1, tokens, d_in, dtype=dtype, requires_grad=True)
    kept = {}
    for frozen in (False, True):
        layer = LoRALinear(nn.Linear(d_in, 64).to(dtype).requires_grad_(False), R, 2.0, 0.0)
        layer.lora_A.requires_grad_(not frozen)
        kept[frozen] = saved_for_backward(layer, x)
    assert kept[True] == tokens * R * 4  # A x in fp32, r wide
    assert kept[False] == kept[True] + tokens * d_in * 4  # and the input in fp32


def test_freeze_a_trains_b_alone_and_saves_a_too(language_dir: Path, tmp_path: Path) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, {"it": LoRA(R, freeze_a=True)})
    model(**our_inputs()).loss.backward()
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert sum(p.numel() for p in tuned.trainable().values()) == sum(R * layer.out_features for layer in layers)
    assert all(layer.lora_A.weight.grad is None and layer.lora_B.weight.grad is not None for layer in layers)
    tuned.save(tmp_path)
    assert any("lora_A" in name for name in load_file(tmp_path / ADAPTER))


def test_gradients_with_a_frozen_a_are_those_of_peft() -> None:
    ours = LoRALinear(base_linear(), R, 2.0, 0.0)
    theirs: Any = peft_layer(LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"]))
    share(ours, theirs)
    ours.lora_A.requires_grad_(False)
    theirs.lora_A.requires_grad_(False)
    assert_same(ours, theirs, inputs())


def test_b_learns_faster_as_in_pefts_optimizer_for_lora_plus() -> None:
    ours = tune(hf_llava(), [LoRA(R, lr_ratio=16.0, targets="minimal")])
    optimizer = adamw(parameter_groups(ours, 1e-3, 0.0), (0.9, 0.999), 1e-8)
    assert set_lr(optimizer, 1.0) == {"lora": pytest.approx(1e-3), "lora x16": pytest.approx(1.6e-2)}
    config = LoraConfig(r=R, target_modules=r".*language_model.*(q_proj|v_proj)")
    theirs = create_loraplus_optimizer(
        get_peft_model(hf_llava(), config), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )
    counts = [
        {round(g["lr"], 9): sum(p.numel() for p in g["params"]) for g in o.param_groups if g["params"]}
        for o in (optimizer, theirs)
    ]
    assert counts[0] == counts[1]


def test_the_factor_holds_beside_a_learning_rate_of_its_own_and_is_no_new_adapter(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, {"it": LoRA(R, lr=2e-4, lr_ratio=4.0)})
    peaks = sorted(g["peak_lr"] for g in parameter_groups(tuned, 1.0, 0.0))
    assert peaks == pytest.approx([2e-4, 8e-4])
    before = tuned.trainable()
    tuned.apply({"it": LoRA(R, lr=1e-4, lr_ratio=1.0)})  # a later stage
    assert tuned.trainable() == before


@pytest.mark.parametrize(
    "options",
    [
        {"init": "gaussian"}, {"init": "orthogonal", "r": 3}, {"lr_ratio": 0.0}, {"lr_ratio": math.inf},
        {"lr_ratio": math.nan},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="C102"):
        LoRA(**options)
