"""What adapters on linear layers share, each beside that of peft: outputs, gradients, merged weights, bf16, counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from peft_twins import D_IN, D_OUT, assert_same, base_linear, inputs, peft_layer, share
from tiny_models import logits, our_inputs, our_vlm, randomise
from torch import nn
from tuner_table import GATED

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.tuners import OFT, AdaLoRA, DoRA, KronA, LoRA, VeRA
from vlmpeft.tuners.adalora import SVDLinear
from vlmpeft.tuners.dora import DoRALinear
from vlmpeft.tuners.krona import FULL, KronALinear, factors
from vlmpeft.tuners.linear import AdaptedLinear
from vlmpeft.tuners.lora_layers import LoRALinear
from vlmpeft.tuners.oft import OFTLinear
from vlmpeft.tuners.vera import Projections, VeRALinear

R, K, SCALE = 4, 8, 3.0
ONE: dict[str, Any] = {"target_modules": ["0"]}


@dataclass(frozen=True)
class Twin:
    """A layer of ours on a base, and peft's.

    count: numbers that a layer trains. tuner, other: two whose folders are not each other's, and what tells so.
    """

    ours: Callable[[nn.Linear, float], AdaptedLinear]
    theirs: Callable[[float], PeftConfig]
    count: Callable[[int, int], int]
    tuner: Any
    other: Any
    told: str


def krona_count(d_in: int, d_out: int) -> int:
    (a, b), (c, d) = factors(d_out), factors(d_in)
    return a * c + b * d


TWINS = {
    "lora": Twin(
        lambda base, dropout: LoRALinear(base, R, SCALE, dropout),
        lambda dropout: LoraConfig(r=R, lora_alpha=SCALE * R, lora_dropout=dropout, **ONE),  # type: ignore[arg-type]
        lambda d_in, d_out: R * (d_in + d_out),
        LoRA(R), LoRA(R, 1.0), "r, alpha, rslora",
    ),
    "dora": Twin(
        lambda base, dropout: DoRALinear(base, R, SCALE, dropout),
        lambda dropout: LoraConfig(r=R, lora_alpha=SCALE * R, lora_dropout=dropout, use_dora=True, **ONE),  # type: ignore[arg-type]
        lambda d_in, d_out: R * (d_in + d_out) + d_out,
        DoRA(R), DoRA(R, 1.0), "r, alpha, rslora",
    ),
    "adalora": Twin(
        lambda base, dropout: SVDLinear(base, R, AdaLoRA(2, R, SCALE).scale, dropout),
        lambda dropout: AdaLoraConfig(
            init_r=R, target_r=2, lora_alpha=SCALE, total_step=9, lora_dropout=dropout, **ONE  # type: ignore[arg-type]
        ),
        lambda d_in, d_out: R * (d_in + d_out + 1),
        AdaLoRA(2, R), AdaLoRA(2, R, 1.0), "lora_alpha",
    ),
    "vera": Twin(
        lambda base, dropout: VeRALinear(base, Projections(R, D_IN, D_OUT, 7, torch.device("cpu")), 0.1, dropout),
        lambda dropout: VeraConfig(r=R, vera_dropout=dropout, projection_prng_key=7, **ONE),
        lambda d_in, d_out: R + d_out,
        VeRA(R, d_initial=0.5), VeRA(R, d_initial=0.5, seed=1), "projection_prng_key",
    ),
    "oft": Twin(
        lambda base, dropout: OFTLinear(base, K, 0),
        lambda dropout: OFTConfig(oft_block_size=K, use_cayley_neumann=False, **ONE),
        lambda d_in, d_out: d_in * (K - 1) // 2,
        OFT(K), OFT(K, neumann=5), "use_cayley_neumann",
    ),
    "krona": Twin(
        lambda base, dropout: KronALinear(base, SCALE),
        lambda dropout: LoKrConfig(r=FULL, alpha=SCALE * FULL, **ONE),  # type: ignore[arg-type]
        krona_count,
        KronA(2.0), KronA(1.0), "alpha",
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("kind", TWINS)
DROPS = {"lora", "dora", "adalora", "vera"}


def pair(kind: str, dropout: float = 0.0) -> tuple[AdaptedLinear, Any]:
    """Ours and peft's on copies of one base, with equal non-zero weights."""
    ours, theirs = TWINS[kind].ours(base_linear(), dropout), peft_layer(TWINS[kind].theirs(dropout))
    share(ours, theirs)
    return ours, theirs


def test_no_kind_is_left_out() -> None:
    assert set(TWINS) == set(GATED) - {"ia3", "bottleneck"}  # IA3 scales the bias too; a bottleneck is no such layer


@pytest.mark.parametrize(("kind", "dropout"), [(k, p) for k in TWINS for p in (0.0, 0.5) if not p or k in DROPS])
def test_outputs_and_gradients_are_those_of_peft(kind: str, dropout: float) -> None:
    ours, theirs = pair(kind, dropout)
    assert_same(ours.train(), theirs.train(), inputs())
    assert_same(ours.eval(), theirs.eval(), inputs())


@EACH
def test_the_merged_weight_is_that_of_peft(kind: str) -> None:
    ours, theirs = pair(kind)
    before = ours.weight.clone()
    ours.merge()
    theirs.merge()
    torch.testing.assert_close(ours.weight, theirs.base_layer.weight)
    assert (ours.weight - before).abs().max() > 1e-3
    ours.unmerge()
    assert ours.weight.equal(before)


@EACH
def test_a_bf16_base_keeps_its_dtype_and_its_start(kind: str) -> None:
    base = base_linear(torch.bfloat16)
    layer = TWINS[kind].ours(base, 0.0)
    x = inputs(torch.bfloat16)
    assert layer(x).equal(base(x))
    assert layer(x).dtype == torch.bfloat16
    randomise(layer.own_parameters())
    expected = x.float() @ (base.weight.float() + layer.delta()).T + base.bias.float()
    torch.testing.assert_close(layer(x).float(), expected, rtol=3e-2, atol=3e-2)


@EACH
def test_it_touches_chosen_tokens_alone_and_trains_as_many_numbers_as_the_formula(
    kind: str, language_dir: Path
) -> None:
    model = our_vlm(language_dir)
    before = logits(model, our_inputs())
    tuned = tune(model, [dataclasses.replace(TWINS[kind].tuner, where="visual")])
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    expected = sum(TWINS[kind].count(m.in_features, m.out_features) for m in layers)
    assert sum(p.numel() for p in tuned.trainable().values()) == expected
    randomise(tuned.trainable())
    after = logits(model, our_inputs())
    assert after[1].equal(before[1])  # the row without an image
    assert not after[0].equal(before[0])


@EACH
def test_a_folder_with_other_settings_is_refused(kind: str, language_dir: Path, tmp_path: Path) -> None:
    twin = TWINS[kind]
    tune(our_vlm(language_dir), {"it": twin.tuner}).save(tmp_path)
    with pytest.raises(ModelError, match=rf"M502.*{twin.told}"):
        tune(our_vlm(language_dir), {"it": twin.other}).load(tmp_path)
