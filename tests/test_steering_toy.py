"""A target that only steering can fit: the logits of a frozen model whose last block reads an edited image.

The edit stands behind the first block's attention, at the first and the last image token alone. A projector acts before
that attention and alike on all tokens, so no projector makes it; steering of the same form must find it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmpeft import tune
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.projectors import PROJECTORS
from vlmpeft.steering import MoReS
from vlmpeft.steering.units import Units, orthonormal
from vlmpeft.tuners import Full
from vlmpeft.vlm import VLM

WIDTH, FEATURES, SAMPLES, TOKENS = 16, 8, 16, 4
EDIT = {"positions": "first_last:1,1", "layers": (1,)}


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    language, projector = LlamaForCausalLM(config), PROJECTORS.build("mlp2x_gelu", FEATURES, WIDTH)
    return VLM(nn.Identity(), projector, language).eval()  # type: ignore[arg-type]


def batch() -> dict[str, Tensor]:
    """Images of random features, each with three words of text behind it."""
    generator = torch.Generator().manual_seed(0)
    image = torch.full((SAMPLES, TOKENS), IMAGE_TOKEN_ID)
    words = torch.randint(5, 60, (SAMPLES, 3), generator=generator)
    ids = torch.cat([torch.full((SAMPLES, 1), 7), image, words], 1)
    features = torch.randn(SAMPLES, TOKENS, FEATURES, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": features}


def text_logits(model: Any) -> Tensor:
    found: Tensor = model(**batch()).logits
    return found[:, 1 + TOKENS :]


@pytest.fixture(scope="module")
def teacher() -> Any:
    """A model with an edit as large as the hidden states it edits."""
    found = model()
    torch.manual_seed(3)
    tune(found, [MoReS(init="reference", **EDIT)])  # type: ignore[arg-type]
    units = found.language.steering.units
    with torch.no_grad():
        units.source.normal_(0, 3 / WIDTH**0.5)
        units.bias.normal_(0, 3)
    return found


def fit(teacher: Any, tuners: Sequence[Any]) -> tuple[float, Any]:
    """Minimise the squared error, as a share of the untouched model's. Returns: the loss at the end; the model."""
    with torch.no_grad():
        target = text_logits(teacher)
        untouched = (text_logits(model()) - target).square().mean()
    student = model()
    torch.manual_seed(2)
    parameters = list(tune(student, list(tuners)).trainable().values())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=60, history_size=30, line_search_fn="strong_wolfe", tolerance_change=0, tolerance_grad=0
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (text_logits(student) - target).square().mean() / untouched
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return float(loss().detach()), student


def edit_of(units: Units) -> tuple[Tensor, Tensor]:
    """The edit as an affine map, whatever basis it is written in: U (A - U^T), U b."""
    u = orthonormal(units.rotation)[0].detach()
    return u @ (units.source[0].detach() - u.T), u @ units.bias[0].detach()  # type: ignore[index]


def test_steering_fits_what_only_steering_can_and_finds_the_very_edit(teacher: Any) -> None:
    loss, student = fit(teacher, [MoReS(**EDIT)])  # type: ignore[arg-type]
    assert loss < 1e-3
    for found, true in zip(
        edit_of(student.language.steering.units), edit_of(teacher.language.steering.units), strict=True
    ):
        assert float((found - true).norm() / true.norm()) < 0.1


@pytest.mark.parametrize("frozen", [False, True])
def test_a_projector_cannot_with_or_without_frozen_random_steering(frozen: bool, teacher: Any) -> None:
    beside = [MoReS(variant="random", **EDIT)] if frozen else []  # type: ignore[arg-type]
    loss, _ = fit(teacher, [Full("projector"), *beside])
    assert loss > 0.05
