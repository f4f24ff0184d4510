"""Likelihoods of given answers: the language model's own loss, batched or not, beginnings shared or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_decode import lively

import vlmpeft
from vlmpeft import likelihood
from vlmpeft.batch import IGNORE, collate
from vlmpeft.build import Bundle
from vlmpeft.config import load_recipe
from vlmpeft.decode import Request, answer_ids, exchange_of
from vlmpeft.errors import ModelError
from vlmpeft.images import ImageReader
from vlmpeft.likelihood import Likelihood
from vlmpeft.template import Exchange, TurnEncoder


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path) -> Bundle:
    made = vlmpeft.build(load_recipe(str(tiny_recipe)))
    lively(made.model)
    return made


@pytest.fixture(scope="module")
def pairs(data_dir: Path) -> list[tuple[Request, str]]:
    """Two to four answers a question, with no, one and two images."""
    first, second = sorted((data_dir / "images").glob("*.png"))[:2]
    asked = [Request((first,), "Is there a red square?"), Request((), "What is 1 plus 1?")]
    asked += [Request((first,), "What is shown?"), Request((first, second), "<image> or <image>?")]
    texts = ["Yes", "No", "A photo of a yellow square", "2"]
    return [(request, text) for request in asked for text in texts]


def expected(bundle: Bundle, request: Request, text: str) -> tuple[float, int, bool]:
    """By the definition: the causal LM's own forward over prompt and answer, one row, no padding."""
    encoder, read = bundle.turn_encoder(), ImageReader(bundle.image_transform)
    prompt, words = encoder.encode([exchange_of(request)]), answer_ids(encoder, text)
    prompt.add(words, supervised=False, turn=0)
    batch = collate([prompt], [view for image in request.images for view in read(image)])
    with torch.no_grad():
        _, embeddings = bundle.model.embed(batch.input_ids, batch.attention_mask, None, batch.pixel_values)
        logits = bundle.model.language(inputs_embeds=embeddings).logits[0, -len(words) - 1 : -1]
    target = torch.tensor(words)
    loss = F.cross_entropy(logits, target, reduction="sum").item()
    return -loss, len(words), bool((logits.argmax(-1) == target).all())


def same(found: list[Likelihood], wanted: list[tuple[float, int, bool]]) -> None:
    assert [(f.tokens, f.greedy) for f in found] == [(w[1], w[2]) for w in wanted]
    assert [f.log_probability for f in found] == pytest.approx([w[0] for w in wanted], abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_equal_to_the_language_models_own_loss(
    bundle: Bundle, pairs: list[tuple[Request, str]], batch_size: int
) -> None:
    same(bundle.likelihoods(pairs, batch_size=batch_size), [expected(bundle, *pair) for pair in pairs])


def test_without_shared_beginnings_the_same(
    bundle: Bundle, pairs: list[tuple[Request, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "can_share", lambda language, length: False)
    monkeypatch.setattr(likelihood, "read_prefixes", None)
    same(bundle.likelihoods(pairs, batch_size=5), [expected(bundle, *pair) for pair in pairs])


def test_what_the_model_says_itself_is_greedy_and_nothing_else_is(bundle: Bundle, pairs: list[Any]) -> None:
    request = pairs[0][0]
    said = bundle.answer([request], max_new_tokens=3)[0].text
    own, other = bundle.likelihoods([(request, said), (request, said + " Yes No Yes")])
    assert (own.greedy, other.greedy) == (len(answer_ids(bundle.turn_encoder(), said)) == 3, False)
    assert other.log_probability < own.log_probability < 0


def test_probabilities_of_all_first_tokens_do_not_exceed_one(bundle: Bundle, pairs: list[Any]) -> None:
    request = pairs[0][0]
    vocabulary = len(bundle.tokenizer)
    encoder = bundle.turn_encoder()
    texts = [t for i in range(vocabulary) if answer_ids(encoder, t := bundle.tokenizer.decode([i])) == [i]]
    found = bundle.likelihoods([(request, text) for text in texts], batch_size=64)
    assert len(texts) > vocabulary / 2
    assert 0 < sum(math.exp(f.log_probability) for f in found) <= 1 + 1e-4


@pytest.mark.parametrize("template", ["chatml", "vicuna_v1", "tokenizer", "plain"])
def test_answer_tokens_are_those_that_training_supervises(bundle: Bundle, template: str) -> None:
    encoder = TurnEncoder(bundle.tokenizer, template, 4)
    trained = encoder.encode([Exchange(("What?",), "A red square")])
    supervised = [i for i, label in zip(trained.input_ids, trained.labels, strict=True) if label != IGNORE]
    words = answer_ids(encoder, "A red square")
    assert supervised[: len(words)] == words
    assert 0 < len(supervised) - len(words) <= 2  # the end of the turn
    asked = encoder.encode([Exchange(("What?",))])
    assert [*asked.input_ids, *words] == trained.input_ids[: len(asked.input_ids) + len(words)]


def test_an_answer_without_a_token_is_refused(bundle: Bundle, pairs: list[Any]) -> None:
    with pytest.raises(ModelError, match=r"M518.*the answer ''"):
        bundle.likelihoods([(pairs[0][0], "")])
