"""A model that says what it is told: for the commands of benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlmpeft
from vlmpeft.decode import Answer, Request


class ToldBundle:
    """Answers a prompt by the first of its keys that the prompt contains; remembers the requests."""

    def __init__(self, told: Mapping[str, str]) -> None:
        self.told = told
        self.requests: list[Request] = []

    def answer(
        self, requests: Sequence[Request], *, on_batch: Callable[[Any], None] | None = None, **_: object
    ) -> list[Answer]:
        self.requests += requests
        texts = [next(text for key, text in self.told.items() if key in request.prompt) for request in requests]
        answers = [Answer(text) for text in texts]
        if on_batch is not None:
            on_batch(list(enumerate(answers)))
        return answers

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        return Image.new("RGB", (2, 2))


def load_told(monkeypatch: pytest.MonkeyPatch, told: Mapping[str, str]) -> ToldBundle:
    """Make `vlmpeft.load` return such a model."""
    bundle = ToldBundle(told)
    monkeypatch.setattr(vlmpeft, "load", lambda directory, device: bundle, raising=False)
    return bundle


def touch(folder: Path, *names: str) -> Path:
    """Pictures of one pixel in a folder, where their headers are all that is read."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1)).save(folder / name)
    return folder
