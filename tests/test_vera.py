"""VeRA's random pair: drawn as peft draws it, and shared. Against peft: test_linear_adapters.py."""

from __future__ import annotations

from typing import Any

import torch
from peft import VeraConfig
from peft_twins import D_IN, D_OUT, base_linear, peft_layer
from torch import nn

from vlmpeft.tuners.vera import Projections, VeRALinear

R = 8


def test_the_pair_is_drawn_as_peft_draws_it_and_shared() -> None:
    ours = VeRALinear(base_linear(), Projections(R, D_IN, D_OUT, 7, torch.device("cpu")), 0.1, 0.0)
    theirs: Any = peft_layer(VeraConfig(r=R, projection_prng_key=7, target_modules=["0"]))
    assert ours.shared.vera_A.equal(theirs.vera_A["default"])
    assert ours.shared.vera_B.equal(theirs.vera_B["default"])
    twin = VeRALinear(base_linear(), ours.shared, 0.1, 0.0)
    both = nn.ModuleList([ours, twin]).to(torch.float64)
    assert both[0].shared.vera_A is both[1].shared.vera_A  # type: ignore[union-attr]
    assert not [k for k in both.state_dict() if "vera_A" in k]
