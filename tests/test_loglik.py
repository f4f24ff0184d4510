"""Answers by likelihood: equal to the model's own forward added up by hand, batched equal to one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from native import make_native, native_bundle
from torch import Tensor

from vlmpeft import likelihood
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.build import Bundle
from vlmpeft.decode import Answer, Request, exchange_of
from vlmpeft.errors import ModelError
from vlmpeft.template import Exchange

YES_NO = ("Yes", "No")
LETTERS = ("A", "B", "C", "D")
TEXTS = ("a red square", "blue", "a photo of nothing that is there", "b", "blue square")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_native(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def bundle(recipe: Path) -> Bundle:
    return native_bundle(recipe)


@pytest.fixture(scope="module")
def requests(data_dir: Path) -> list[Request]:
    """Questions about the same and other pictures, about two and none, with candidates of one token and of many."""
    pictures = sorted((data_dir / "images").glob("*.png"))
    made = [Request((pictures[i % 3],), f"Is there a {c} square?", YES_NO) for i, c in enumerate(("red", "green", "a"))]
    made += [Request((pictures[0],), f"Which of {n}?\nA. x\nB. y", LETTERS[: 2 + n]) for n in range(3)]
    made += [Request((pictures[1],), "What is shown?", TEXTS), Request((pictures[0],), "And here?", TEXTS[:3])]
    made += [Request((), "What is red?", TEXTS[1:3]), Request((), "Yes or No?", YES_NO)]
    pair = (pictures[1], pictures[2])
    return [*made, Request(pair, "Is <image> like <image>?", YES_NO), Request(pair, "<image> or <image>?", TEXTS)]


@torch.no_grad()
def by_hand(bundle: Bundle, request: Request, candidate: str) -> float:
    """The sum of the log-probabilities of a candidate's tokens in one plain forward of the language model itself."""
    encoder, language = bundle.turn_encoder(), bundle.model.language
    question = exchange_of(request).question
    prompt = encoder.encode([Exchange(question)]).input_ids
    answer = bundle.tokenizer(candidate, add_special_tokens=False)["input_ids"]  # byte-level: no space comes in front
    assert encoder.encode([Exchange(question, candidate)]).input_ids[: len(prompt) + len(answer)] == prompt + answer
    embeddings, images = [], iter(_images(bundle, request))
    for token in prompt + answer:
        at = torch.tensor([max(token, 0)])
        embeddings.append(next(images)[None] if token == IMAGE_TOKEN_ID else language.get_input_embeddings()(at))
    logits = language(inputs_embeds=torch.cat(embeddings)[None]).logits[0].double()
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


def _images(bundle: Bundle, request: Request) -> Tensor:
    """(all image tokens, width) in order of appearance."""
    from vlmpeft.images import ImageReader

    read = ImageReader(bundle.image_transform)
    views = [view for image in request.images for view in read(image)]
    return bundle.model.image_embeddings(torch.stack(views)).flatten(0, 1) if views else torch.empty(0, 32)


def values(answers: list[Answer]) -> list[tuple[float, ...]]:
    return [answer.logliks or () for answer in answers]


def test_log_likelihoods_are_those_of_a_plain_forward(bundle: Bundle, requests: list[Request]) -> None:
    for request, answer in zip(requests, bundle.answer(requests, batch_size=5), strict=True):
        expected = [by_hand(bundle, request, candidate) for candidate in request.candidates]
        assert answer.logliks == pytest.approx(expected, abs=1e-4)
        assert answer.text == request.candidates[expected.index(max(expected))]


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batched_equals_one_by_one(bundle: Bundle, requests: list[Request], batch_size: int) -> None:
    alone = [bundle.answer([request])[0] for request in requests]
    found = bundle.answer(requests, batch_size=batch_size)
    assert [a.text for a in found] == [a.text for a in alone]
    assert len({a.text for a in found}) > 3
    for ours, theirs in zip(values(found), values(alone), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def rows_read(bundle: Bundle, requests: list[Request], batch_size: int) -> dict[str, Any]:
    """How the model was run: rows of each forward of the language model, images encoded."""
    rows, images = list[int](), list[int]()

    def read(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(kwargs["inputs_embeds"].shape[0])

    def see(module: Any, args: Any) -> None:
        images.append(len(args[0]))

    language = bundle.model.language.get_decoder().register_forward_pre_hook(read, with_kwargs=True)
    vision = bundle.model.vision.register_forward_pre_hook(see)
    bundle.answer(requests, batch_size=batch_size)
    language.remove()
    vision.remove()
    return {"rows": rows, "images": sum(images)}


def test_candidates_of_one_token_cost_one_row_of_one_forward(bundle: Bundle, requests: list[Request]) -> None:
    assert rows_read(bundle, [requests[3]], 8) == {"rows": [1], "images": 1}
    assert rows_read(bundle, [Request((), "A or B?", LETTERS)], 8) == {"rows": [1], "images": 0}


def test_an_image_is_read_once_for_all_its_questions_and_candidates(bundle: Bundle, requests: list[Request]) -> None:
    same = [request for request in requests if request.images == requests[0].images]
    assert [len(request.candidates) for request in same] == [2, 2, 3, 4, 3]
    found = rows_read(bundle, same, 16)
    assert found["images"] == 1
    assert found["rows"] == [1, sum(_rows(bundle, request) for request in same)]


def _rows(bundle: Bundle, request: Request) -> int:
    """Rows a request takes: one for all candidates that differ in their last token alone."""
    return len({tuple(_tokens(bundle, text)[:-1]) for text in request.candidates})


def _tokens(bundle: Bundle, text: str) -> list[int]:
    ids: list[int] = bundle.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_a_batch_holds_no_more_rows_than_it_may(bundle: Bundle, requests: list[Request]) -> None:
    several = max(_rows(bundle, request) for request in requests)
    assert several > 2
    assert max(rows_read(bundle, requests, 2)["rows"]) == several  # one question's rows stay together
    assert max(rows_read(bundle, requests, 6)["rows"]) <= 6


def test_the_margin_is_that_of_generation(bundle: Bundle, requests: list[Request]) -> None:
    """For words of one token the difference of log-likelihoods is that of logits, which decode computes by itself."""
    words = ("B", "A")
    assert all(len(_tokens(bundle, word)) == 1 for word in words)
    plain = [dataclasses.replace(r, candidates=()) for r in requests]
    expected = [a.margin for a in bundle.answer(plain, contrast=words, max_new_tokens=1)]
    found = bundle.answer([dataclasses.replace(r, candidates=words) for r in requests], contrast=words)
    assert [a.margin for a in found] == pytest.approx(expected, abs=1e-4)
    assert [a.text for a in found] == ["B" if margin >= 0 else "A" for margin in expected if margin is not None]
    assert bundle.answer([requests[0]], contrast=words)[0].margin is None


def test_long_candidates_can_be_compared_per_character(bundle: Bundle, requests: list[Request]) -> None:
    asked = [r for r in requests if len(r.candidates) > 2]
    sums = bundle.answer(asked)
    means = bundle.answer([dataclasses.replace(r, per_character=True) for r in asked])
    assert values(sums) == values(means)
    assert [a.text for a in sums] != [a.text for a in means]
    for request, answer in zip(asked, means, strict=True):
        scores = [v / len(text) for v, text in zip(answer.logliks or (), request.candidates, strict=True)]
        assert answer.text == request.candidates[scores.index(max(scores))]


def test_the_first_of_equals_is_chosen(bundle: Bundle) -> None:
    answer = bundle.answer([Request((), "Which?", ("No", "Yes", "No"))])[0]
    assert answer.logliks is not None
    assert answer.logliks[0] == answer.logliks[2]
    assert bundle.answer([Request((), "Which?", ("Yes", "Yes"))])[0].text == "Yes"


def test_requests_with_and_without_candidates_keep_their_order(bundle: Bundle, requests: list[Request]) -> None:
    mixed = [r if i % 2 else dataclasses.replace(r, candidates=()) for i, r in enumerate(requests)]
    seen: list[int] = []
    found = bundle.answer(
        mixed, max_new_tokens=3, batch_size=4, on_batch=lambda pairs: seen.extend(i for i, _ in pairs)
    )
    assert sorted(seen) == list(range(len(mixed)))
    for i, (request, answer) in enumerate(zip(mixed, found, strict=True)):
        alone = bundle.answer([request], max_new_tokens=3)[0]
        assert answer.text == alone.text
        assert (answer.logliks is not None) is bool(i % 2)


@pytest.mark.parametrize("where", ["answer", "text", "visual"])
def test_gated_adapters_see_candidates_as_answers(where: str, recipe: Path, requests: list[Request]) -> None:
    """As in training, where the labels say what the answer is: minus the loss is the log-likelihood."""
    bundle = native_bundle(recipe, f"stages.instruct.tuners.lora.where={where}")
    asked = [r for r in requests if len(r.images) == 1]
    for request, answer in zip(asked, bundle.answer(asked), strict=True):
        for candidate, value in zip(request.candidates, answer.logliks or (), strict=True):
            assert value == pytest.approx(_by_loss(bundle, request, candidate), abs=1e-4)


@torch.no_grad()
def _by_loss(bundle: Bundle, request: Request, candidate: str) -> float:
    whole = bundle.turn_encoder().encode([Exchange(exchange_of(request).question, candidate)])
    ids = torch.tensor([whole.input_ids])
    tokens = _tokens(bundle, candidate)
    start = next(i for i, label in enumerate(whole.labels) if label != IGNORE)
    labels = torch.full_like(ids, IGNORE)
    labels[0, start : start + len(tokens)] = torch.tensor(tokens)
    from vlmpeft.images import ImageReader

    pixels = ImageReader(bundle.image_transform)(request.images[0])
    loss = bundle.model(ids, labels=labels, pixel_values=pixels).loss
    return -float(loss) * len(tokens)


def test_a_model_whose_beginning_cannot_be_shared_gives_the_same(
    bundle: Bundle, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(bundle.answer(requests, batch_size=16))
    monkeypatch.setattr(likelihood, "can_share", lambda language, length: False)
    for ours, theirs in zip(values(bundle.answer(requests, batch_size=16)), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_candidate_without_tokens_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ModelError, match="M518"):
        bundle.answer([Request((), "Which?", ("Yes", ""))])
