"""The assembled model: splice parity with transformers' LLaVA, the loss, mixed batches, gradients, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llava import IMAGE_ID, TOKENS, VOCABULARY, hf_llava, our_llava
from torch import Tensor

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, Batch, collate, supervised_index
from vlmpeft.errors import ModelError
from vlmpeft.template import Encoding
from vlmpeft.vlm import VLM

IMAGE = [IMAGE_TOKEN_ID] * TOKENS
ROWS = {  # ids of a conversation; the last four are the answer
    "one image": [1, 5, *IMAGE, 7, 8, 9, 10, 11, 12],
    "three images": [1, *IMAGE, 6, *IMAGE, *IMAGE, 9, 3, 4, 5, 6],
    "two images": [*IMAGE, *IMAGE, 30, 31, 32, 33, 34],
    "text": [1, 20, 21, 22, 23, 24, 25, 26],
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    return hf_llava()


@pytest.fixture(scope="module")
def model(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return our_llava(theirs, tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def encoding(name: str) -> Encoding:
    ids = ROWS[name]
    return Encoding(list(ids), [IGNORE] * (len(ids) - 4) + ids[-4:], [0] * len(ids))


def batch_of(names: list[str], images: Tensor, side: str = "right") -> Batch:
    count = sum(ROWS[n].count(IMAGE_TOKEN_ID) // TOKENS for n in names)
    return collate([encoding(n) for n in names], list(images[:count]), side=side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("names", [["one image"], ["three images"], ["text"], list(ROWS), ["text", "two images"]])
@torch.no_grad()
def test_logits_equal_those_of_transformers_llava(
    theirs: Any, model: VLM, images: Tensor, names: list[str], side: str
) -> None:
    batch = batch_of(names, images, side)
    mask = batch.attention_mask
    expected = theirs(
        input_ids=batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN_ID, IMAGE_ID),
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0),
        pixel_values=batch.pixel_values,
    ).logits
    found = model(batch.input_ids, mask, pixel_values=batch.pixel_values).logits
    assert (found - expected)[mask].abs().max() <= 1e-5
    assert expected[mask].std() > 0.1


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_full_logits(model: VLM, images: Tensor, side: str) -> None:
    batch = batch_of(list(ROWS), images, side)
    full = model(batch.input_ids, batch.attention_mask, pixel_values=batch.pixel_values).logits
    shifted = full[:, :-1].reshape(-1, VOCABULARY), batch.labels[:, 1:].flatten()
    for options in ({"supervised": batch.supervised}, {}):
        out = model(batch.input_ids, batch.attention_mask, batch.labels, batch.pixel_values, **options)
        assert out.logits.shape == (16, VOCABULARY)
        torch.testing.assert_close(out.loss, F.cross_entropy(*shifted, ignore_index=IGNORE))
    summed = model(**batch.tensors(), num_items_in_batch=7).loss
    torch.testing.assert_close(summed, F.cross_entropy(*shifted, ignore_index=IGNORE, reduction="sum") / 7)


@torch.no_grad()
def test_a_mixed_batch_loses_what_its_rows_lose_alone(model: VLM, images: Tensor) -> None:
    together = batch_of(list(ROWS), images)
    out = model(**together.tensors(), num_items_in_batch=1)
    rows = supervised_index(together.labels) // together.labels.shape[1]
    targets = together.labels.flatten()[supervised_index(together.labels) + 1]
    losses = F.cross_entropy(out.logits, targets, reduction="none")
    start = 0
    for i, name in enumerate(ROWS):
        count = ROWS[name].count(IMAGE_TOKEN_ID) // TOKENS
        alone = model(**batch_of([name], images[start : start + count]).tensors(), num_items_in_batch=1).loss
        start += count
        assert abs(alone - losses[rows == i].sum()) <= 1e-5
        assert abs(alone - losses[rows == i].sum()) / alone <= 1e-6


@torch.no_grad()
def test_padding_content_reaches_nothing(model: VLM, images: Tensor) -> None:
    batch = batch_of(list(ROWS), images)
    ids = batch.input_ids.masked_fill(~batch.attention_mask, IMAGE_TOKEN_ID)  # even placeholders there do not count
    first, second = (
        model(i, batch.attention_mask, pixel_values=batch.pixel_values).logits for i in (batch.input_ids, ids)
    )
    assert torch.equal(first[batch.attention_mask], second[batch.attention_mask])


@torch.no_grad()
def test_the_second_images_features_go_to_the_second_placeholder_block(model: VLM, images: Tensor) -> None:
    batch = batch_of(["three images"], images)
    assert batch.pixel_values is not None
    visual = batch.input_ids == IMAGE_TOKEN_ID
    ids, mask = batch.input_ids, batch.attention_mask
    routing, embeddings = model.embed(ids, mask, None, batch.pixel_values)
    assert routing.visual.equal(visual)
    spliced = embeddings[visual].view(3, TOKENS, 32)
    torch.testing.assert_close(spliced, model.image_embeddings(batch.pixel_values))
    _, cached = model.embed(ids, mask, None, model.vision(batch.pixel_values))  # features computed before
    torch.testing.assert_close(cached[visual].view(3, TOKENS, 32), spliced)


@pytest.mark.parametrize(("count", "message"), [(0, "48 image placeholders.*0 tokens"), (2, "48 .*32"), (4, "48 .*64")])
def test_placeholders_and_images_must_agree(model: VLM, images: Tensor, count: int, message: str) -> None:
    batch = batch_of(["three images"], images)
    with pytest.raises(ModelError, match=f"M515.*{message}"):
        model(batch.input_ids, batch.attention_mask, pixel_values=images[:count] if count else None)


def test_gradients_reach_the_projector_through_a_frozen_language_model(model: VLM, images: Tensor) -> None:
    model.projector.requires_grad_(True)
    try:
        batch = batch_of(list(ROWS), images)
        model(**batch.tensors()).loss.backward()
        touched = [n for n, p in model.named_parameters() if p.grad is not None]
        assert touched == [f"projector.{n}" for n, _ in model.projector.named_parameters()]
        weight = model.projector.get_submodule("0").weight
        assert isinstance(weight, Tensor)
        _matches_finite_difference(model, batch, weight)
    finally:
        model.zero_grad(set_to_none=True)
        model.projector.requires_grad_(False)


@torch.no_grad()
def _matches_finite_difference(model: VLM, batch: Batch, weight: Tensor) -> None:
    assert weight.grad is not None
    direction, step = weight.grad / weight.grad.norm(), 1e-2
    losses = []
    for sign in (1, -1):
        weight += sign * step * direction
        losses.append(model(**batch.tensors()).loss)
        weight -= sign * step * direction
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), weight.grad.norm(), rtol=2e-2, atol=0)


def test_a_text_only_batch_trains_like_the_others_with_zero_gradients(model: VLM) -> None:
    batch = collate([encoding("text")]).tensors()
    with torch.no_grad():
        expected = model(**batch).loss
    model.projector.requires_grad_(True)
    try:
        loss = model(**batch).loss
        loss.backward()
        assert torch.equal(loss.detach(), expected)
        assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
    finally:
        model.zero_grad(set_to_none=True)
        model.projector.requires_grad_(False)


def test_a_bf16_base_with_an_fp32_projector(tmp_path: Path, theirs: Any, images: Tensor) -> None:
    full = our_llava(theirs, tmp_path)
    batch = batch_of(list(ROWS), images)
    with torch.no_grad():
        expected = full(**batch.tensors()).loss
    full.vision.to(torch.bfloat16)
    full.language.to(torch.bfloat16)
    full.projector.requires_grad_(True)
    out = full(**batch.tensors())
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert {p.dtype for p in full.projector.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in full.projector.parameters())
    assert abs(out.loss - expected) < 0.05


def test_parts_describe_the_model(model: VLM) -> None:
    parts = model.parts
    assert (parts.vision, parts.projector, parts.language) == (model.vision, model.projector, model.language)
    assert parts.lm_head is model.language.lm_head
    assert parts.blocks == list(model.language.model.layers)
    assert parts.image_token_id == IMAGE_TOKEN_ID
