"""Likelihoods of given answers: how many tokens they have, and whether the model would say them itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_decode import lively

import vlmpeft
from vlmpeft.batch import collate
from vlmpeft.build import Bundle
from vlmpeft.config import load_recipe
from vlmpeft.decode import Request, exchange_of
from vlmpeft.images import ImageReader
from vlmpeft.template import Exchange

TEXTS = ("Yes", "No", "A photo of a yellow square", "2")


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path) -> Bundle:
    made = vlmpeft.build(load_recipe(str(tiny_recipe)))
    lively(made.model)
    return made


@pytest.fixture(scope="module")
def requests(data_dir: Path) -> list[Request]:
    """Questions with no, one and two images; to some the model's own first words are a candidate."""
    first, second = sorted((data_dir / "images").glob("*.png"))[:2]
    asked = [Request((first,), "Is there a red square?", TEXTS), Request((), "What is 1 plus 1?", TEXTS[:2])]
    return [*asked, Request((first,), "What?", TEXTS[1:]), Request((first, second), "<image> or <image>?", TEXTS[:1])]


def expected(bundle: Bundle, request: Request, text: str) -> tuple[float, int, bool]:
    """By the definition: the causal LM's own loss over the answer, one row, no padding."""
    encoder, read = bundle.turn_encoder(), ImageReader(bundle.image_transform)
    words = bundle.tokenizer(text, add_special_tokens=False)["input_ids"]  # byte-level: no space comes in front
    whole = encoder.encode([Exchange(exchange_of(request).question, text)])
    start = len(encoder.encode([exchange_of(request)]).input_ids)
    assert whole.input_ids[start : start + len(words)] == words
    batch = collate([whole], [view for image in request.images for view in read(image)])
    with torch.no_grad():
        _, embeddings = bundle.model.embed(batch.input_ids, batch.attention_mask, None, batch.pixel_values)
        logits = bundle.model.language(inputs_embeds=embeddings).logits[0, start - 1 : start + len(words) - 1]
    loss = F.cross_entropy(logits, torch.tensor(words), reduction="sum").item()
    return -loss, len(words), logits.argmax(-1).tolist() == words


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equal_to_the_language_models_own_loss(bundle: Bundle, requests: list[Request], batch_size: int) -> None:
    found = [row for rows in bundle.likelihoods(requests, batch_size=batch_size) for row in rows]
    wanted = [expected(bundle, request, text) for request in requests for text in request.candidates]
    assert [(f.tokens, f.greedy) for f in found] == [(tokens, greedy) for _, tokens, greedy in wanted]
    assert [f.log_probability for f in found] == pytest.approx([value for value, *_ in wanted], abs=1e-3)


def test_what_the_model_says_itself_is_greedy_and_nothing_else_is(bundle: Bundle, requests: list[Request]) -> None:
    image, prompt = requests[0].images, requests[0].prompt
    words = [t for i in range(len(bundle.tokenizer)) if _is_one(bundle, t := bundle.tokenizer.decode([i]))]
    [found] = bundle.likelihoods([Request(image, prompt, tuple(words))], batch_size=64)
    assert len(words) > len(bundle.tokenizer) / 2
    assert sum(math.exp(f.log_probability) for f in found) <= 1 + 1e-4
    best = max(found, key=lambda f: f.log_probability)
    assert all(f.greedy is False for f in found if f is not best)
    said = bundle.answer([Request(image, prompt)], max_new_tokens=1)[0].text
    assert best.greedy == (words[found.index(best)].strip() == said)


def _is_one(bundle: Bundle, text: str) -> bool:
    """Whether a text is a token by itself, and one that an answer may hold."""
    ids = bundle.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return len(ids) == 1 and bool(text.strip())
