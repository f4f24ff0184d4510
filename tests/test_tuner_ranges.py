"""Options of tuners that no model could have are refused where the tuner is made, whatever makes it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vlmpeft.errors import ConfigError
from vlmpeft.tuners import (
    OFT,
    AdaLoRA,
    DoRA,
    EmbeddingLoRA,
    Full,
    KronA,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    VeRA,
)  # fmt: skip

WRONG: dict[Any, list[dict[str, Any]]] = {
    LoRA: [
        {"r": 0}, {"r": -1}, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": math.nan}, {"alpha": 0.0},
        {"alpha": math.nan}, {"lr": 0.0}, {"lr": 1.1}, {"lr": math.nan}, {"part": "langauge"}, {"targets": ()},
    ],
    DoRA: [{"r": 0}, {"dropout": 1.0}, {"alpha": 0.0}, {"lr": 0.0}, {"part": "langauge"}],
    AdaLoRA: [
        {"r": 0}, {"r": 8, "init_r": 4}, {"tinit": 1.0}, {"tinit": 0.6, "tfinal": 0.4}, {"delta_t": 0}, {"beta1": 1.0},
        {"beta2": 0.0}, {"orthogonality": -0.1}, {"lr": 0.0}, {"alpha": 0.0}, {"dropout": 1.0},
    ],
    VeRA: [{"r": 0}, {"dropout": 1.0}, {"d_initial": 0.0}, {"seed": -1}, {"lr": 0.0}],
    OFT: [{"block_size": 1}, {"neumann": 3}, {"neumann": -1}, {"lr": 0.0}],
    KronA: [{"scale": 0.0}, {"lr": 0.0}, {"part": "langauge"}],
    EmbeddingLoRA: [{"r": 0}, {"alpha": 0.0}, {"lr": 0.0}],
    PrefixTuning: [{"tokens": 0}, {"hidden": 0}, {"part": "vision"}, {"lr": 0.0}],
    PTuningV2: [{"tokens": 0}, {"prompts": 0}, {"part": "projector"}, {"lr": 2.0}],
    PromptTuning: [
        {"tokens": 0}, {"init": "vocab"}, {"init": "text"}, {"init_text": "a"}, {"part": "vision"}, {"lr": -1.0},
    ],
    Full: [{"lr": 0.0}, {"lr": -1e-3}, {"lr": 1.5}, {"lr": math.nan}, {"part": "projectors"}],
}  # fmt: skip
AT_THE_EDGE: dict[Any, list[dict[str, Any]]] = {
    LoRA: [{"r": 1}, {"dropout": 0.0}, {"dropout": 0.99}, {"lr": 1.0}, {"part": "lm_head"}],
}


@pytest.mark.parametrize(("tuner", "options"), [(t, o) for t, several in WRONG.items() for o in several])
def test_values_out_of_range_are_refused_by_name(tuner: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"C102.*{tuner.kind}\.({'|'.join(options)}|init_r|init_text|tfinal)"):
        tuner(**options)


@pytest.mark.parametrize(("tuner", "options"), [(t, o) for t, several in AT_THE_EDGE.items() for o in several])
def test_values_at_the_edge_of_the_range_are_taken(tuner: Any, options: dict[str, Any]) -> None:
    tuner(**options)
