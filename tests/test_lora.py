"""LoRA against peft: the same weights give the same outputs and gradients, in every precision we train in."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_twins import D_IN, D_OUT, assert_same, base_linear, inputs, peft_layer, share
from torch import nn

from vlmpeft.tuners import LoRA
from vlmpeft.tuners.lora_layers import LoRALinear

R, ALPHA = 4, 12.0


def pair(dtype: torch.dtype = torch.float32, rslora: bool = False, dropout: float = 0.0) -> tuple[LoRALinear, Any]:
    """Our layer and peft's on copies of one base, with equal non-zero adapters in fp32."""
    tuner = LoRA(R, ALPHA, dropout, rslora=rslora)
    ours = LoRALinear(base_linear(dtype), R, tuner.scale, dropout)
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=dropout, use_rslora=rslora, target_modules=["0"])  # type: ignore[arg-type]
    theirs = peft_layer(config, dtype)
    share(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("rslora", [False, True])
def test_matches_peft_outputs_and_gradients_in_fp32(rslora: bool) -> None:
    ours, theirs = pair(rslora=rslora)
    assert_same(ours, theirs, inputs())


def test_matches_peft_on_a_bf16_base_with_fp32_adapters() -> None:
    ours, theirs = pair(torch.bfloat16)
    assert ours(inputs(torch.bfloat16)).dtype == torch.bfloat16
    assert_same(ours, theirs, inputs(torch.bfloat16))


def test_matches_peft_under_autocast() -> None:
    ours, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(inputs()).dtype == torch.bfloat16
        assert_same(ours, theirs, inputs(), 2e-2)  # bf16 products, summed in another order


def test_dropout_draws_what_peft_draws_and_acts_in_training_only() -> None:
    ours, theirs = pair(dropout=0.5)
    assert_same(ours.train(), theirs.train(), inputs())
    kept = ours.train()(inputs())
    assert not torch.equal(kept, ours.eval()(inputs()))
    assert_same(ours.eval(), theirs.eval(), inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_its_base_bit_for_bit_at_init(dtype: torch.dtype) -> None:
    layer = LoRALinear(base_linear(dtype), R, 2.0, 0.0)
    assert torch.equal(layer(inputs(dtype)), layer.base_layer(inputs(dtype)))
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_takes_the_mode_of_its_base(training: bool) -> None:
    assert LoRALinear(base_linear().train(training), R, 2.0, 0.5).dropout.training is training


def test_init_is_that_of_loralib() -> None:
    layer = LoRALinear(nn.Linear(512, 256), 64, 2.0, 0.0)
    bound = 1 / math.sqrt(512)  # Kaiming-uniform with a = sqrt(5): sqrt(6 / (1 + 5) / fan_in)
    assert layer.lora_A.weight.abs().max() <= bound
    assert layer.lora_A.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not layer.lora_B.weight.any()


@pytest.mark.parametrize("shape", [(D_IN,), (3, D_IN), (2, 3, 4, D_IN), (0, D_IN)])
def test_takes_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    ours, _ = pair()
    x = torch.randn(shape)
    out = ours(x)
    assert out.shape == (*shape[:-1], D_OUT)
    assert torch.allclose(out, ours.base_layer(x) + x @ ours.delta().T, atol=1e-5)


def test_runs_on_the_meta_device() -> None:
    layer = LoRALinear(nn.Linear(D_IN, D_OUT, device="meta"), R, 2.0, 0.0)
    assert layer(torch.empty(3, D_IN, device="meta")).shape == (3, D_OUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_brings_the_weight_back_bit_for_bit(dtype: torch.dtype) -> None:
    ours, _ = pair(dtype)
    before = ours.base_layer.weight.clone()
    ours.merge()
    ours.merge()  # a second time is no second time
    assert not torch.equal(ours.base_layer.weight, before)
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, before)
    assert ours.merged_from is None


def test_merged_equals_unmerged_and_peft_merged() -> None:
    ours, theirs = pair()
    x = inputs().detach()
    unmerged = ours(x)
    ours.merge()
    theirs.merge()
    assert torch.allclose(ours(x), unmerged, atol=1e-5)
    assert torch.allclose(ours.base_layer.weight, theirs.base_layer.weight, atol=1e-6)


def test_a_copy_of_a_layer_is_its_own() -> None:
    ours, _ = pair()
    twin = copy.deepcopy(ours)
    nn.init.zeros_(twin.lora_B.weight)
    assert ours.lora_B.weight.any()


@pytest.mark.parametrize(
    ("options", "scale"),
    [({"r": 8}, 2.0), ({"r": 8, "alpha": 8.0}, 1.0), ({"r": 16, "alpha": 8.0, "rslora": True}, 2.0)],
)
def test_scale_follows_the_papers(options: dict, scale: float) -> None:
    assert LoRA(**options).scale == pytest.approx(scale)
