"""DoRA against peft: outputs and gradients with the same weights, files, and the life of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_twins import (
    assert_same,
    base_linear,
    inputs,
    logits,
    peft_layer,
    share,
)
from tiny_models import our_inputs, our_vlm, randomise
from torch import nn

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.tuners import DoRA, LoRA
from vlmpeft.tuners.dora import DoRALinear

R, ALPHA = 4, 12.0


def pair(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[DoRALinear, nn.Module]:
    ours = DoRALinear(base_linear(dtype), R, ALPHA / R, dropout)
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=True, target_modules=["0"])
    theirs = peft_layer(config, dtype)
    share(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_matches_peft_outputs_and_gradients(dropout: float) -> None:
    ours, theirs = pair(dropout=dropout)
    assert_same(ours.train(), theirs.train(), inputs())
    assert_same(ours.eval(), theirs.eval(), inputs())


def test_matches_the_formula_with_a_detached_norm_on_a_bf16_base() -> None:
    ours = pair(torch.bfloat16)[0]
    x = inputs(torch.bfloat16)
    direction = ours.weight.float() + ours.scale * ours.lora_B.weight @ ours.lora_A.weight
    unit = direction / direction.norm(dim=1, keepdim=True)
    expected = x.float() @ (ours.lora_magnitude_vector[:, None] * unit).T + ours.base_layer.bias
    out = ours(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_the_norm_is_that_of_the_rows_and_a_row_of_zeros_gives_no_nan() -> None:
    layer, _ = pair()
    direct = (layer.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight).norm(dim=1)
    torch.testing.assert_close(layer.norm(), direct)
    base = base_linear()
    base.weight[3] = 0
    fresh = DoRALinear(base, R, 1.0, 0.0)
    assert fresh(inputs()).equal(base(inputs()))
    fresh(inputs()).sum().backward()
    assert all(p.grad.isfinite().all() for p in fresh.own_parameters().values() if p.grad is not None)


def test_the_magnitude_of_the_merged_weight_is_the_learned_one() -> None:
    layer, theirs = pair()
    layer.merge()
    torch.testing.assert_close(layer.weight.norm(dim=1), layer.lora_magnitude_vector.abs())
    merging: Any = theirs
    merging.merge()
    torch.testing.assert_close(layer.weight, merging.base_layer.weight)


def test_it_has_a_magnitude_for_every_output_and_touches_chosen_tokens_alone(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    before = logits(model, our_inputs())
    tuned = tune(model, [DoRA(R, where="visual")])
    layers = [m for m in model.modules() if isinstance(m, DoRALinear)]
    expected = sum(R * (m.in_features + m.out_features) + m.out_features for m in layers)
    assert sum(p.numel() for p in tuned.trainable().values()) == expected
    randomise(tuned.trainable())
    after = logits(model, our_inputs())
    assert after[1].equal(before[1])  # the row without an image
    assert not after[0].equal(before[0])


def test_a_plain_lora_folder_is_refused(language_dir: Path, tmp_path: Path) -> None:
    tune(our_vlm(language_dir), {"it": LoRA(R)}).save(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*use_dora"):
        tune(our_vlm(language_dir), {"it": DoRA(R)}).load(tmp_path)


@pytest.mark.parametrize("options", [{"r": 0}, {"dropout": 1.0}, {"alpha": 0.0}, {"lr": 0.0}, {"part": "langauge"}])
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="C102"):
        DoRA(**options)
