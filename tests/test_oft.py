"""OFT against peft, with the exact Cayley map and as a series: outputs, gradients, rotations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig
from peft_twins import (
    assert_same,
    base_linear,
    inputs,
    peft_layer,
    share,
)
from tiny_models import our_vlm
from torch import nn

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.tuners import OFT
from vlmpeft.tuners.oft import OFTLinear

K = 8


def pair(terms: int) -> tuple[OFTLinear, nn.Module]:
    ours = OFTLinear(base_linear(), K, terms)
    options: dict[str, Any] = {"num_cayley_neumann_terms": terms} if terms else {}
    theirs = peft_layer(OFTConfig(oft_block_size=K, use_cayley_neumann=terms > 0, target_modules=["0"], **options))
    share(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("terms", [0, 4, 5, 8])
def test_matches_peft_outputs_and_gradients(terms: int) -> None:
    assert_same(*pair(terms), inputs())


def test_the_exact_map_gives_rotations_and_the_series_nearly() -> None:
    for terms, tolerance in ((0, 1e-5), (12, 0.1)):
        rotation = pair(terms)[0].oft_R()
        product = rotation @ rotation.mT
        assert (product - torch.eye(K)).abs().max() < tolerance
        assert torch.linalg.det(rotation).min() > 0


def test_the_merged_weight_has_rows_of_the_same_length_and_angles() -> None:
    ours, _ = pair(0)
    before = ours.weight @ ours.weight.T
    ours.merge()
    torch.testing.assert_close(ours.weight @ ours.weight.T, before, rtol=1e-4, atol=1e-5)


def test_the_base_runs_once(language_dir: Path) -> None:
    layer, calls = pair(0)[0], []
    layer.base_layer.register_forward_hook(lambda *seen: calls.append(seen))
    layer(inputs())
    assert len(calls) == 1


def test_a_width_that_blocks_do_not_divide_is_refused_with_the_nearest_that_do(language_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"M551.*5.*32.*example to 4"):
        tune(our_vlm(language_dir), [OFT(5)])
