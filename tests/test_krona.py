"""KronA's factors. Against peft's LoKr with whole factors: test_linear_adapters.py."""

from __future__ import annotations

import pytest
import torch
from peft_twins import D_IN, D_OUT, base_linear
from tiny_models import randomise

from vlmpeft.tuners.krona import KronALinear, factors


@pytest.mark.parametrize(
    ("width", "expected"), [(16, (4, 4)), (24, (4, 6)), (128, (8, 16)), (127, (1, 127)), (1, (1, 1))]
)
def test_the_factors_of_a_width_are_as_near_as_they_come(width: int, expected: tuple[int, int]) -> None:
    assert factors(width) == expected


def test_the_update_has_full_rank() -> None:
    layer = KronALinear(base_linear(), 3.0)
    randomise(layer.own_parameters(), scale=1.0)
    assert torch.linalg.matrix_rank(layer.delta()) == min(D_IN, D_OUT)
