"""MoReS' variants, options and parameter counts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from steered import KINDS, block_outputs, logits, make
from tiny_models import hf_llava, randomise

from vlmpeft import tune
from vlmpeft.errors import ConfigError
from vlmpeft.optim import parameter_groups
from vlmpeft.parts import table_text
from vlmpeft.projectors import PROJECTORS
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "mores.rank=0"),
        ({"dropout": 1.0}, "mores.dropout=1.0"),
        ({"part": "vision"}, "mores.part='vision'"),
        ({"lr": 2.0}, "mores.lr=2.0"),
        ({"positions": "some"}, "positions='some'"),
        ({"layers": "every:0"}, "layers='every:0' names no blocks"),
        ({"site": "block"}, "mores.site='block'.*one of block_input, block_output"),
        ({"init": "zero"}, "mores.init='zero'"),
        ({"variant": "free"}, "mores.variant='free'"),
        ({"tokens": "image"}, "mores.tokens='image'"),
    ],
)
def test_a_wrong_option_is_named_before_there_is_a_model(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"C102.*{message}"):
        MoReS(**options)


def test_a_block_or_a_rank_that_the_model_lacks_is_named_and_nothing_is_left_behind() -> None:
    model = hf_llava()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match="the model has 2 blocks"):
        tune(model, [MoReS(layers=(5,))])
    with pytest.raises(ConfigError, match=r"mores.rank=33.*at most 32, the width"):
        tune(model, [MoReS(rank=33)])
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("variant", ["mores", "unconstrained"])
def test_the_norms_are_those_of_the_edits_matrices(variant: Any, language_dir: Path) -> None:
    model, _ = make("ours", language_dir)
    tuned = tune(model, [MoReS(rank=3, variant=variant)])
    steering: Any = model.language.steering
    if variant == "mores":
        assert float(steering.norms().max()) < 1e-5  # identity init
    randomise(tuned.trainable())
    units = steering.units
    for number, found in enumerate(steering.norms().tolist()):
        up, source = units.rotation[number].detach(), units.source[number].detach()
        if variant == "mores":
            q, r = torch.linalg.qr(up)
            up = q * torch.diagonal(r).sign()
            source = source - up.mT
        assert found == pytest.approx(float((up @ source).norm()), rel=1e-5)


def test_the_table_of_a_tuned_model_says_what_the_paper_counts(language_dir: Path) -> None:
    for bias, note in ((True, " (128 without biases)"), (False, "")):
        model, _ = make("ours", language_dir)
        text = table_text("stage", tune(model, [MoReS(bias=bias), Full("projector")]).table())
        (line,) = [line for line in text.splitlines() if "mores" in line]
        assert line.endswith(f"  mores{note}")
        assert "  projector  " in text


def test_evaluation_is_the_same_every_time_and_dropout_rests(language_dir: Path) -> None:
    model, inputs = make("ours", language_dir)
    tuned = tune(model, [MoReS(positions="all", dropout=0.5)])
    randomise(tuned.trainable())
    first = logits(model.eval(), inputs)
    assert logits(model, inputs).equal(first)
    model.language.steering.units.dropout = 0.0
    assert logits(model, inputs).equal(first)
    model.language.steering.units.dropout = 0.5
    assert not logits(model.train(), inputs).equal(first)
    assert logits(model.eval(), inputs).equal(first)


def test_weight_decay_leaves_steering_alone(language_dir: Path) -> None:
    model, _ = make("ours", language_dir)
    tuned = tune(model, {"mores": MoReS(rank=2), "projector": Full("projector")})
    decay = {name: g["weight_decay"] for g in parameter_groups(tuned, 1e-3, 0.1) for name in g["parameter_names"]}
    assert {value for name, value in decay.items() if "steering" in name} == {0.0}
    assert 0.1 in decay.values()


def test_the_documented_table_of_parameters_is_that_of_the_formula_and_of_the_projectors_modules() -> None:
    text = (Path(__file__).parents[1] / "docs" / "steering.md").read_text()
    shapes = {
        "Phi-2, SigLIP": (2560, 32, 1152),
        "Vicuna-7B, CLIP": (4096, 32, 1024),
        "Vicuna-13B, CLIP": (5120, 40, 1024),
    }
    for name, (width, layers, features) in shapes.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        counts = [parameter_count(width, layers, r, bias) for r in (1, 2, 4, 8) for bias in (False, True)]
        with torch.device("meta"):
            projector = PROJECTORS.build("mlp2x_gelu", features, width)
        counts.append(sum(p.numel() for p in projector.parameters()))  # type: ignore[attr-defined]
        assert [int(figure.replace(",", "")) for figure in re.findall(r"\d[\d,]{5,}", row)] == counts
