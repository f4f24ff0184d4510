"""Masks and positions of a batch; independent turns equal the same turns trained one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, collate
from vlmpeft.language import load_language
from vlmpeft.routing import position_ids, routing_of, turn_mask
from vlmpeft.template import IMAGE, Encoding, Exchange, TurnEncoder
from vlmpeft.vlm import VLM

TOKENS, WIDTH = 4, 6


@pytest.mark.parametrize("side", ["right", "left"])
def test_masks_part_the_real_tokens(side: str) -> None:
    rows = [
        Encoding([1, -200, -200, 2, 3], [IGNORE, IGNORE, IGNORE, 2, 3], [0] * 5),
        Encoding([4, 5], [IGNORE, 5], [0] * 2),
    ]
    batch = collate(rows, side=side)
    routing = routing_of(batch.input_ids, batch.attention_mask, batch.labels, IMAGE_TOKEN_ID)
    assert torch.equal(routing.visual | routing.text, batch.attention_mask)
    assert not (routing.visual & routing.text).any()
    assert batch.input_ids[routing.visual].tolist() == [-200, -200]
    assert routing.answer is not None
    assert routing.predict is not None
    assert batch.input_ids[routing.answer].tolist() == [2, 3, 5]
    assert batch.input_ids[routing.predict].tolist() == [-200, 2, 4]
    assert torch.equal(routing.predict.flatten().nonzero()[:, 0], batch.supervised)
    bare = routing_of(batch.input_ids, batch.attention_mask, None, IMAGE_TOKEN_ID)
    assert (bare.answer, bare.predict, bare.adapter) == (None, None, None)


def test_padding_is_never_routed_even_if_it_holds_the_image_id() -> None:
    ids = torch.tensor([[1, 0, 0]])
    mask = torch.tensor([[True, True, False]])
    routing = routing_of(ids, mask, torch.tensor([[IGNORE, 0, 0]]), image_token_id=0)
    assert routing.visual.tolist() == [[False, True, False]]
    assert routing.answer is not None
    assert routing.answer.tolist() == [[False, True, False]]


def test_positions_restart_after_the_shared_prefix() -> None:
    turns = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[True] * 7 + [False], [True] * 3 + [False] * 5])
    assert position_ids(mask, turns)[0, :7].tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert position_ids(mask, turns)[1, :3].tolist() == [0, 1, 2]
    assert position_ids(torch.tensor([[False, False, True, True]]), None).tolist() == [[0, 0, 0, 1]]


def test_a_turn_sees_the_prefix_and_itself_and_nothing_later() -> None:
    turns = torch.tensor([[0, 0, 1, 1, 2, 2, 0]])
    mask = torch.tensor([[True] * 6 + [False]])
    allowed = turn_mask(mask, turns, torch.float32)[0, 0] == 0
    expected = [[True] * (i + 1) + [False] * (6 - i) for i in range(7)]
    for row in (4, 5):
        expected[row][2] = expected[row][3] = False
    assert allowed[:6].tolist() == expected[:6]
    assert allowed[6].any()  # a row of padding attends to something, or the softmax would be NaN


def test_padding_on_the_left_is_seen_by_nobody_but_itself() -> None:
    turns, mask = torch.tensor([[0, 0, 0, 1, 2]]), torch.tensor([[False, False, True, True, True]])
    allowed = turn_mask(mask, turns, torch.float32)[0, 0] == 0
    assert allowed[:2].tolist() == [[True, False, False, False, False], [False, True, False, False, False]]
    assert allowed[2:, :2].sum() == 0
    assert allowed[2:, 2:].tolist() == [[True, False, False], [True, True, False], [True, False, True]]


@pytest.fixture(scope="module")
def model(language_dir: Path) -> VLM:
    language, _ = load_language(str(language_dir))
    torch.manual_seed(1)
    return VLM(nn.Identity(), nn.Linear(WIDTH, 32), language.requires_grad_(True))


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> TurnEncoder:
    return TurnEncoder(tokenizer, "chatml", TOKENS, system="Look.")


Turn = tuple[str, str]
Step = tuple[float, dict[str, Tensor]]  # loss, gradients by name
FIRST: list[Turn] = [("Is there a red square?", "Yes"), ("What is shown?", "A photo of a red square."), ("Blue?", "No")]
SECOND: list[Turn] = [("Describe it.", "A green square"), ("Is it green?", "Yes")]
WORDS: list[Turn] = [("What is 1 plus 1?", "2"), ("And 2 plus 2?", "4")]


def packed(turns: list[Turn], image: bool = True) -> list[Exchange]:
    first = (IMAGE, f"\n{turns[0][0]}") if image else (turns[0][0],)
    return [Exchange(first, turns[0][1]), *(Exchange((q,), a) for q, a in turns[1:])]


def loss_and_gradients(model: VLM, encodings: list[Encoding], images: list[Tensor], items: int) -> Step:
    model.zero_grad()
    batch = collate(encodings, images)
    loss = model(**batch.tensors(), num_items_in_batch=items).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def summed(parts: list[Step]) -> Step:
    names = {n for _, grads in parts for n in grads}
    return sum(v for v, _ in parts), {n: sum(g[n] for _, g in parts if n in g) for n in names}  # type: ignore[misc]


def one_by_one(encoder: TurnEncoder, model: VLM, turns: list[Turn], image: Tensor, items: int) -> list[Step]:
    alone = [encoder.encode([Exchange((IMAGE, f"\n{q}"), a)]) for q, a in turns]
    return [loss_and_gradients(model, [e], [image], items) for e in alone]


def assert_equal(found: Step, expected: Step) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    assert "projector.weight" in found[1]
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_independent_turns_train_as_single_turns_would(model: VLM, encoder: TurnEncoder) -> None:
    image = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    encoding = encoder.encode(packed(FIRST), independent=True)
    items = encoding.num_supervised
    expected = summed(one_by_one(encoder, model, FIRST, image, items))
    assert_equal(loss_and_gradients(model, [encoding], [image], items), expected)
    dependent = loss_and_gradients(model, [encoder.encode(packed(FIRST))], [image], items)
    assert abs(dependent[0] - expected[0]) > 1e-3  # in order, later turns see earlier ones: not the same


def test_padding_and_text_rows_in_the_batch_change_nothing(model: VLM, encoder: TurnEncoder) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2)]
    rows = [encoder.encode(packed(t, image), True) for t, image in ((SECOND, True), (WORDS, False), (FIRST, True))]
    assert len({len(r.input_ids) for r in rows}) == 3
    items = sum(r.num_supervised for r in rows)
    text = loss_and_gradients(model, [encoder.encode(packed(WORDS, False))], [], items)
    singles = [
        *one_by_one(encoder, model, SECOND, images[0], items),
        *one_by_one(encoder, model, FIRST, images[1], items),
    ]
    assert_equal(loss_and_gradients(model, rows, images, items), summed([text, *singles]))


def test_swapped_images_change_only_their_own_rows(model: VLM, encoder: TurnEncoder) -> None:
    images = [torch.full((TOKENS, WIDTH), v) for v in (1.0, -1.0)]
    rows = [encoder.encode(packed(t, image), True) for t, image in ((FIRST, True), (WORDS, False), (SECOND, True))]
    batch = collate(rows)

    def hidden(shown: list[Tensor]) -> Tensor:
        with torch.no_grad():
            fields = {k: v for k, v in batch.tensors().items() if k not in ("labels", "supervised")}
            logits: Tensor = model(**fields, pixel_values=torch.stack(shown)).logits
        return logits

    plain, swapped = hidden(images), hidden(images[::-1])
    assert torch.equal(plain[1], swapped[1])
    assert not torch.allclose(plain[0], swapped[0])
    assert not torch.allclose(plain[2], swapped[2])
    repeated = hidden([images[0], images[0]])
    assert torch.equal(plain[0], repeated[0])
