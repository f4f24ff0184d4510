"""MoReS' variants, options and parameter counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steered import KINDS, block_outputs, logits, make
from tiny_models import hf_llava

from vlmpeft import tune
from vlmpeft.errors import ConfigError
from vlmpeft.steering import MoReS, parameter_count
from vlmpeft.tuners import Full


def test_frozen_random_steering_is_the_same_from_its_seed_and_trains_nothing(language_dir: Path) -> None:
    outs = []
    for seed in (0, 0, 1):
        model, inputs = make("ours", language_dir)
        tuned = tune(model, [MoReS(variant="random", positions="all", seed=seed), Full("projector")])
        assert not any("steering" in name for name in tuned.trainable())
        outs.append(logits(model, inputs))
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(outs[2])


@pytest.mark.parametrize(("tokens", "expected"), [("visual", [1, 2, 3, 4]), ("text", [0])])
def test_loreft_steers_the_prompts_text(tokens: Any, expected: list[int], language_dir: Path) -> None:
    model, inputs = make("ours", language_dir)
    before = block_outputs(model, inputs)[0][0]
    tuned = tune(model, [MoReS(positions="all", tokens=tokens, site="block_output", init="reference")])
    assert tuned.trainable()
    after = block_outputs(model, inputs)[0][0]
    where = (before != after).any(-1).nonzero().flatten().tolist()
    if tokens == "text":  # without labels every text token belongs to the prompt
        expected = [0, 5, 6, 7]
    assert where == expected


@pytest.mark.parametrize(
    ("width", "layers", "counts"),
    [
        (2560, 32, (163_840, 327_680, 655_360, 1_310_720)),
        (4096, 32, (262_144, 524_288, 1_048_576, 2_097_152)),
        (5120, 40, (409_600, 819_200, 1_638_400, 3_276_800)),
    ],
)
def test_parameters_are_those_of_the_published_table(width: int, layers: int, counts: tuple[int, ...]) -> None:
    for rank, count in zip((1, 2, 4, 8), counts, strict=True):
        assert parameter_count(width, layers, rank, bias=False) == count
        assert parameter_count(width, layers, rank) == count + layers * rank


@KINDS
@pytest.mark.parametrize("bias", [True, False])
def test_what_it_trains_is_what_the_formula_says(kind: str, bias: bool, language_dir: Path) -> None:
    model, _ = make(kind, language_dir)
    tuned = tune(model, [MoReS(rank=3, bias=bias, layers="all")])
    assert sum(p.numel() for p in tuned.trainable().values()) == parameter_count(32, 2, 3, bias)


def test_wrong_options_are_named() -> None:
    for options, message in (
        ({"rank": 0}, "mores.rank"), ({"dropout": 1.0}, "mores.dropout"), ({"part": "vision"}, "mores.part"),
        ({"positions": "some"}, "positions='some'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            MoReS(**options)
    with pytest.raises(ConfigError, match="the model has 2 blocks"):
        tune(hf_llava(), [MoReS(layers=(5,))])
