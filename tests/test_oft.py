"""OFT against peft, with the exact Cayley map and as a series: outputs, gradients, files, and its life."""

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
    logits,
    peft_layer,
    share,
)
from tiny_models import our_inputs, our_vlm, randomise
from torch import nn

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.tuners import OFT
from vlmpeft.tuners.oft import OFTLinear

K = 8
TUNERS = [OFT(K), OFT(K, neumann=5, targets="minimal")]


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


def test_the_merged_weight_is_that_of_peft_with_rows_of_the_same_length_and_angles() -> None:
    ours, theirs = pair(0)
    before = ours.weight @ ours.weight.T
    merging: Any = theirs
    merging.merge()
    ours.merge()
    torch.testing.assert_close(ours.weight, merging.base_layer.weight)
    torch.testing.assert_close(ours.weight @ ours.weight.T, before, rtol=1e-4, atol=1e-5)


def test_the_base_runs_once(language_dir: Path) -> None:
    layer, calls = pair(0)[0], []
    layer.base_layer.register_forward_hook(lambda *seen: calls.append(seen))
    layer(inputs())
    assert len(calls) == 1


def test_a_width_that_blocks_do_not_divide_is_refused_with_the_nearest_that_do(language_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"M551.*5.*32.*example to 4"):
        tune(our_vlm(language_dir), [OFT(5)])


def test_it_touches_chosen_tokens_alone_and_has_as_many_parameters_as_the_formula(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    before = logits(model, our_inputs())
    tuned = tune(model, [OFT(K, where="visual")])
    layers = [m for m in model.modules() if isinstance(m, OFTLinear)]
    assert sum(p.numel() for p in tuned.trainable().values()) == sum(m.in_features * (K - 1) // 2 for m in layers)
    randomise(tuned.trainable())
    after = logits(model, our_inputs())
    assert after[1].equal(before[1])  # the row without an image
    assert not after[0].equal(before[0])


def test_a_bf16_base_keeps_its_dtype_and_its_start() -> None:
    base = base_linear(torch.bfloat16)
    layer = OFTLinear(base, K, 0)
    x = inputs(torch.bfloat16)
    assert layer(x).equal(base(x))
    assert layer(x).dtype == torch.bfloat16
    randomise(layer.own_parameters())
    expected = x.float() @ (base.weight.float() + layer.delta()).T + base.bias.float()
    torch.testing.assert_close(layer(x).float(), expected, rtol=3e-2, atol=3e-2)


def test_a_folder_with_other_settings_is_refused(language_dir: Path, tmp_path: Path) -> None:
    tune(our_vlm(language_dir), {"it": TUNERS[0]}).save(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*use_cayley_neumann"):
        tune(our_vlm(language_dir), {"it": OFT(K, neumann=5)}).load(tmp_path)


@pytest.mark.parametrize("options", [{"block_size": 1}, {"neumann": 3}, {"neumann": -1}, {"lr": 0.0}])
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="C102"):
        OFT(**options)
