"""VeRA against peft: the same random pair from the seed, outputs, gradients, files, and its life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig
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
from vlmpeft.tuners import VeRA
from vlmpeft.tuners.vera import Projections, VeRALinear

R = 8
TUNERS = [VeRA(R, d_initial=0.5), VeRA(R, targets="minimal", seed=3)]


def pair(dropout: float = 0.0) -> tuple[VeRALinear, nn.Module]:
    ours = VeRALinear(base_linear(), Projections(R, D_IN, D_OUT, 7, torch.device("cpu")), 0.1, dropout)
    config = VeraConfig(r=R, vera_dropout=dropout, projection_prng_key=7, target_modules=["0"])
    theirs = peft_layer(config)
    share(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_matches_peft_outputs_and_gradients(dropout: float) -> None:
    ours, theirs = pair(dropout)
    assert_same(ours.train(), theirs.train(), inputs())
    assert_same(ours.eval(), theirs.eval(), inputs())


def test_the_pair_is_drawn_as_peft_draws_it_and_shared() -> None:
    ours, theirs = pair()
    other: Any = theirs
    assert ours.shared.vera_A.equal(other.vera_A["default"])
    assert ours.shared.vera_B.equal(other.vera_B["default"])
    twin = VeRALinear(base_linear(), ours.shared, 0.1, 0.0)
    both = nn.ModuleList([ours, twin]).to(torch.float64)
    assert both[0].shared.vera_A is both[1].shared.vera_A  # type: ignore[union-attr]
    assert not [k for k in both.state_dict() if "vera_A" in k]


def test_the_merged_weight_is_that_of_peft() -> None:
    ours, theirs = pair()
    merging: Any = theirs
    merging.merge()
    ours.merge()
    torch.testing.assert_close(ours.weight, merging.base_layer.weight)


def test_it_touches_chosen_tokens_alone_and_has_as_many_parameters_as_the_formula(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    before = logits(model, our_inputs())
    tuned = tune(model, [VeRA(R, d_initial=0.5, where="visual")])
    layers = [m for m in model.modules() if isinstance(m, VeRALinear)]
    assert sum(p.numel() for p in tuned.trainable().values()) == sum(R + m.out_features for m in layers)
    randomise(tuned.trainable())
    after = logits(model, our_inputs())
    assert after[1].equal(before[1])  # the row without an image
    assert not after[0].equal(before[0])


def test_a_bf16_base_keeps_its_dtype_and_its_start() -> None:
    base = base_linear(torch.bfloat16)
    layer = VeRALinear(base, Projections(R, D_IN, D_OUT, 0, torch.device("cpu")), 0.1, 0.0)
    x = inputs(torch.bfloat16)
    assert layer(x).equal(base(x))
    assert layer(x).dtype == torch.bfloat16
    randomise(layer.own_parameters())
    expected = x.float() @ (base.weight.float() + layer.delta()).T + base.bias.float()
    torch.testing.assert_close(layer(x).float(), expected, rtol=3e-2, atol=3e-2)


def test_a_folder_with_other_settings_is_refused(language_dir: Path, tmp_path: Path) -> None:
    tune(our_vlm(language_dir), {"it": TUNERS[0]}).save(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*projection_prng_key"):
        tune(our_vlm(language_dir), {"it": VeRA(R, d_initial=0.5, seed=1)}).load(tmp_path)


@pytest.mark.parametrize("options", [{"r": 0}, {"dropout": 1.0}, {"d_initial": 0.0}, {"seed": -1}, {"lr": 0.0}])
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="C102"):
        VeRA(**options)
