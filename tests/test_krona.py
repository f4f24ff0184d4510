"""KronA against peft's LoKr with whole factors: outputs, gradients, files, and its life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig
from peft_twins import (
    D_IN,
    D_OUT,
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
from vlmpeft.tuners import KronA
from vlmpeft.tuners.krona import FULL, KronALinear, factors

TUNERS = [KronA(2.0), KronA(targets="minimal")]


def pair(scale: float = 3.0) -> tuple[KronALinear, nn.Module]:
    ours = KronALinear(base_linear(), scale)
    theirs = peft_layer(LoKrConfig(r=FULL, alpha=scale * FULL, target_modules=["0"]))
    share(ours, theirs)
    return ours, theirs


def test_matches_peft_outputs_and_gradients() -> None:
    assert_same(*pair(), inputs())


def test_the_merged_weight_is_that_of_peft() -> None:
    ours, theirs = pair()
    merging: Any = theirs
    merging.merge()
    ours.merge()
    torch.testing.assert_close(ours.weight, merging.base_layer.weight)


@pytest.mark.parametrize(
    ("width", "expected"), [(16, (4, 4)), (24, (4, 6)), (128, (8, 16)), (127, (1, 127)), (1, (1, 1))]
)
def test_the_factors_of_a_width_are_as_near_as_they_come(width: int, expected: tuple[int, int]) -> None:
    assert factors(width) == expected


def test_the_update_has_full_rank() -> None:
    assert torch.linalg.matrix_rank(pair()[0].delta()) == min(D_IN, D_OUT)


def test_it_touches_chosen_tokens_alone_and_has_as_many_parameters_as_the_formula(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    before = logits(model, our_inputs())
    tuned = tune(model, [KronA(where="visual")])
    layers = [m for m in model.modules() if isinstance(m, KronALinear)]
    assert (
        sum(p.numel() for p in tuned.trainable().values())
        == sum(m.lokr_w1.numel() + m.lokr_w2.numel() for m in layers)
        == sum(a * c + b * d for m in layers for (a, b), (c, d) in [(factors(m.out_features), factors(m.in_features))])
    )
    randomise(tuned.trainable())
    after = logits(model, our_inputs())
    assert after[1].equal(before[1])  # the row without an image
    assert not after[0].equal(before[0])


def test_a_bf16_base_keeps_its_dtype_and_its_start() -> None:
    base = base_linear(torch.bfloat16)
    layer = KronALinear(base, 1.0)
    x = inputs(torch.bfloat16)
    assert layer(x).equal(base(x))
    assert layer(x).dtype == torch.bfloat16
    randomise(layer.own_parameters())
    expected = x.float() @ (base.weight.float() + layer.delta()).T + base.bias.float()
    torch.testing.assert_close(layer(x).float(), expected, rtol=3e-2, atol=3e-2)


def test_a_folder_with_other_settings_is_refused(language_dir: Path, tmp_path: Path) -> None:
    tune(our_vlm(language_dir), {"it": TUNERS[0]}).save(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*alpha"):
        tune(our_vlm(language_dir), {"it": KronA(1.0)}).load(tmp_path)


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"lr": 0.0}, {"part": "langauge"}])
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="C102"):
        KronA(**options)
