"""DoRA against its formulas: norms, magnitudes, a row of zeros. Against peft: test_linear_adapters.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_twins import base_linear, inputs, tensors_of
from tiny_models import our_vlm, randomise

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.tuners import DoRA, LoRA
from vlmpeft.tuners.dora import DoRALinear

R, ALPHA = 4, 12.0


def layer_of(dtype: torch.dtype = torch.float32) -> DoRALinear:
    layer = DoRALinear(base_linear(dtype), R, ALPHA / R, 0.0)
    randomise(tensors_of(layer), 1)
    return layer


def test_matches_the_formula_with_a_detached_norm_on_a_bf16_base() -> None:
    ours = layer_of(torch.bfloat16)
    x = inputs(torch.bfloat16)
    direction = ours.weight.float() + ours.scale * ours.lora_B.weight @ ours.lora_A.weight
    unit = direction / direction.norm(dim=1, keepdim=True)
    expected = x.float() @ (ours.lora_magnitude_vector[:, None] * unit).T + ours.base_layer.bias
    out = ours(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_the_norm_is_that_of_the_rows_and_a_row_of_zeros_gives_no_nan() -> None:
    layer = layer_of()
    direct = (layer.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight).norm(dim=1)
    torch.testing.assert_close(layer.norm(), direct)
    base = base_linear()
    base.weight[3] = 0
    fresh = DoRALinear(base, R, 1.0, 0.0)
    assert fresh(inputs()).equal(base(inputs()))
    fresh(inputs()).sum().backward()
    assert all(p.grad.isfinite().all() for p in fresh.own_parameters().values() if p.grad is not None)


def test_the_magnitude_of_the_merged_weight_is_the_learned_one() -> None:
    layer = layer_of()
    layer.merge()
    torch.testing.assert_close(layer.weight.norm(dim=1), layer.lora_magnitude_vector.abs())


def test_a_plain_lora_folder_is_refused(language_dir: Path, tmp_path: Path) -> None:
    tune(our_vlm(language_dir), {"it": LoRA(R)}).save(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*use_dora"):
        tune(our_vlm(language_dir), {"it": DoRA(R)}).load(tmp_path)
