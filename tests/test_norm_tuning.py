"""Norm tuning: exactly the norms, whatever library they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import hf_inputs, hf_llava, our_inputs, our_vlm, randomise
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.tuners import BitFit, NormTuning
from vlmpeft.tuners.sites import is_norm


def make(kind: str, language_dir: Path) -> tuple[Any, dict[str, Tensor], str]:
    if kind == "ours":
        return our_vlm(language_dir), our_inputs(), "language.model"
    return hf_llava(), hf_inputs(), "model.language_model"


KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(4), True), (nn.RMSNorm(4), True), (nn.GroupNorm(2, 4), True), (LlamaRMSNorm(4), True),
        (GemmaRMSNorm(4), True), (nn.Linear(4, 4), False), (nn.BatchNorm1d(4), False),
    ],
)  # fmt: skip
def test_norms_are_known_by_their_type(module: nn.Module, expected: bool) -> None:
    assert is_norm(module) is expected


@KINDS
def test_it_trains_the_norms_of_the_part(kind: str, language_dir: Path) -> None:
    model, _, root = make(kind, language_dir)
    tuned = tune(model, [NormTuning()])
    norms = [f"layers.{i}.{n}_layernorm" for i in range(2) for n in ("input", "post_attention")]
    assert set(tuned.trainable()) == {f"{root}.{n}.trained.weight" for n in [*norms, "norm"]}
    assert sum(p.numel() for p in tuned.trainable().values()) == 5 * 32


@KINDS
def test_gradients_and_merged_weights_are_those_of_norms_trained_in_place(kind: str, language_dir: Path) -> None:
    model, inputs, _ = make(kind, language_dir)
    tuned = tune(model, [NormTuning()])
    randomise(tuned.trainable())
    twin, _, _ = make(kind, language_dir)
    twin.requires_grad_(False)
    places = {name: twin.get_parameter(name.replace(".trained.", ".")) for name in tuned.trainable()}
    for name, parameter in places.items():
        parameter.data = tuned.trainable()[name].detach().clone()
        parameter.requires_grad_(True)
    for one in (model, twin):
        one(**inputs).loss.backward()
    for name, parameter in places.items():
        torch.testing.assert_close(tuned.trainable()[name].grad, parameter.grad, rtol=1e-6, atol=1e-6)
    tuned.merge_and_unload()
    assert all(value.equal(twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ModelError, match=r"M551.*projector has no norms"):
        tune(hf_llava(), [NormTuning("projector")])
    with pytest.raises(ModelError, match=r"M552.*another tuner trains weights of model.vision_tower"):
        tune(hf_llava(), [BitFit("vision"), NormTuning("vision")])
    with pytest.raises(ConfigError, match=r"norm.lr"):
        NormTuning(lr=0.0)
