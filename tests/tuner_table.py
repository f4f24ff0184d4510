"""Every way of tuning by a name, and which of them promise what: for the tests of what all of them promise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_twins import tune_calibrated
from tiny_models import make, randomise
from torch import Tensor

from vlmpeft.steering import MoReS
from vlmpeft.tune import Tuned
from vlmpeft.tuners import (
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DoRA,
    EmbeddingLoRA,
    FishMask,
    Full,
    GradualUnfreezing,
    KronA,
    LayerTuning,
    LoRA,
    NormTuning,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    Tuner,
    UniPELT,
    VeRA,
)  # fmt: skip

TABLE: dict[str, Tuner] = {
    "lora": LoRA(r=4),
    "lora rslora q v": LoRA(r=4, rslora=True, targets="minimal"),
    "lora visual": LoRA(r=4, where="visual"),
    "lora pissa": LoRA(r=4, init="pissa"),
    "lora pissa rslora": LoRA(r=4, init="pissa", rslora=True),
    "lora pissa visual": LoRA(r=4, init="pissa", where="visual"),
    "lora orthogonal": LoRA(r=4, init="orthogonal"),
    "lora frozen a": LoRA(r=4, freeze_a=True),
    "adalora": AdaLoRA(r=2, init_r=4, tinit=0.1, tfinal=0.3),
    "adalora text": AdaLoRA(r=2, init_r=4, where="text"),
    "dora": DoRA(r=4),
    "dora rslora q v": DoRA(4, 6.0, rslora=True, targets="minimal"),
    "vera": VeRA(r=8, d_initial=0.1),
    "vera q v": VeRA(r=8, targets="minimal"),
    "oft": OFT(block_size=4),
    "oft neumann": OFT(block_size=8, neumann=5),
    "krona": KronA(2.0),
    "krona q v": KronA(targets="minimal"),
    "ia3": IA3(),
    "ia3 text": IA3(where="text"),
    "houlsby": BottleneckAdapter(dim=6),
    "pfeiffer visual": BottleneckAdapter(dim=6, placement="pfeiffer", activation="gelu", where="visual"),
    "prefix": PrefixTuning(tokens=3, hidden=None),
    "projected prefix": PrefixTuning(tokens=3, hidden=6),
    "prompt": PromptTuning(tokens=3),
    "p-tuning v2": PTuningV2(tokens=3, prompts=2),
    "unipelt": UniPELT(r=4, tokens=3, hidden=None, dim=6),
    "unipelt projected": UniPELT(r=4, tokens=3, hidden=6),
    "mores": MoReS(rank=2, positions="all"),
    "mores reference": MoReS(rank=2, positions="all", site="block_output", init="reference"),
    "loreft": MoReS(rank=2, positions="all", tokens="text"),
    "mores unconstrained": MoReS(rank=2, positions="uniform:2", variant="unconstrained"),
    "norm": NormTuning(),
    "layers": LayerTuning(which="last:1"),
    "fish": FishMask(0.02),
    "unfreeze": GradualUnfreezing((1, 1), (0, 2)),
    "bitfit": BitFit(part="vision"),
    "embedding lora": EmbeddingLoRA(r=4),
    "full": Full("projector"),
}
GATED = {  # a tuner of every kind with `where`, by kind
    tuner.kind: tuner
    for tuner in TABLE.values()
    if any(f.name == "where" for f in dataclasses.fields(tuner))  # type: ignore[arg-type]
}
ELSEWHERE = {"token_rows"}  # they need new tokens first: test_tokens.py
VIRTUAL = {  # what they add is there before any training
    "prefix", "projected prefix", "prompt", "p-tuning v2", "unipelt", "unipelt projected",
}  # fmt: skip
START = dict.fromkeys(VIRTUAL, 1e3) | {
    "mores reference": 1e3,
    "lora orthogonal": 1e-5,
}  # how far off the base it may start; else not at all
IN_PLACE = {"full"}
UNMERGEABLE = VIRTUAL | {
    "lora visual", "lora pissa visual", "adalora text", "ia3 text", "houlsby", "pfeiffer visual", "mores",
    "mores reference", "mores unconstrained", "loreft",
    "embedding lora",  # the tiny language model's head is tied to its embedding
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", TABLE)


def tuned_model(name: str, kind: str, language_dir: Path, size: float = 1.0) -> tuple[Any, dict[str, Tensor], Tuned]:
    """A model under a tuner of the table, inputs for it, and the tuner's parameters away from their start.

    Args: size: of their values, in tenths.
    """
    model, given = make(kind, language_dir)
    torch.manual_seed(2)
    tuned = tune_calibrated(model, TABLE[name], given)
    randomise(tuned.trainable(), scale=0.1 * size)
    return model, given, tuned
