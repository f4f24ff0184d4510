"""Yes or no by likelihood, in one forward an image: the margins of the questions asked one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import make_bundle

from vlmpeft.build import Bundle
from vlmpeft.decode import Request
from vlmpeft.errors import NumericError
from vlmpeft.features import cache_features
from vlmpeft.images import ImageReader
from vlmpeft.margins import YesNo


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path) -> Bundle:
    return make_bundle(tiny_recipe, "stages.instruct.tuners.lora.dropout=0")


@pytest.fixture(scope="module")
def questions(data_dir: Path) -> list[dict[str, Any]]:
    """Two or three questions about each of five images, not in the order of the images."""
    rows = [json.loads(line) for line in (data_dir / "pope.jsonl").read_text().splitlines()]
    images = [row["image"] for row in rows[:5]]
    texts = [row["text"] for row in rows]
    return [{"question_id": i, "image": images[i * 2 % 5], "text": texts[i], "label": "yes"} for i in range(12)]


def alone(bundle: Bundle, questions: list[dict[str, Any]], folder: Path, suffix: str) -> list[float]:
    asked = [Request((folder / q["image"],), q["text"] + suffix) for q in questions]
    found = [bundle.answer([one], max_new_tokens=1, contrast=("Yes", "No"))[0].margin for one in asked]
    return [value for value in found if value is not None]


@pytest.mark.parametrize("suffix", ["", "\nOne word."])
def test_margins_are_those_of_generation(
    bundle: Bundle, questions: list[dict[str, Any]], data_dir: Path, suffix: str
) -> None:
    folder = data_dir / "images"
    expected = alone(bundle, questions, folder, suffix)
    ask = YesNo(bundle, questions, folder, ImageReader(bundle.image_transform), suffix)
    assert len(ask.groups) == 5  # a row an image
    for size in (1, 3, 8):
        torch.testing.assert_close(ask.margins(bundle, size), expected, rtol=0, atol=2e-4)
    assert max(expected) - min(expected) > 0.02  # they say something


def test_cached_features_give_the_same_margins(bundle: Bundle, questions: list[dict[str, Any]], data_dir: Path) -> None:
    folder, read = data_dir / "images", ImageReader(bundle.image_transform)
    vision: Any = bundle.model.vision
    cached = cache_features(vision, read, sorted(folder.iterdir()))
    plain = YesNo(bundle, questions, folder, read).margins(bundle, 4)
    torch.testing.assert_close(YesNo(bundle, questions, folder, cached).margins(bundle, 4), plain, rtol=0, atol=1e-5)


def test_a_margin_that_is_not_finite_is_an_error(
    tiny_recipe: Path, questions: list[dict[str, Any]], data_dir: Path
) -> None:
    broken = make_bundle(tiny_recipe)
    with torch.no_grad():
        next(broken.model.projector.parameters()).fill_(torch.nan)
    ask = YesNo(broken, questions, data_dir / "images", ImageReader(broken.image_transform))
    with pytest.raises(NumericError, match="N301"):
        ask.margins(broken, 8)
