"""A model's stand-in for the benchmarks: says what it is told and looks at what it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmpeft.decode import Answer, Request, exchange_of
from vlmpeft.images import open_image


class FakeBundle:
    """Answers by a text of the prompt; the last question first. `shown`: size and first pixel of every picture."""

    def __init__(self, says: Mapping[str, str] | None = None, default: str = "A") -> None:
        self.says, self.default = says or {}, default
        self.prompts: list[str] = []
        self.shown: list[list[tuple[tuple[int, int], Any]]] = []
        self.files: list[list[Any]] = []
        self.asked: dict[str, Any] = {}

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 16,
        batch_size: int = 16,
        contrast: tuple[str, str] | None = None,
        on_batch: Callable[[Sequence[tuple[int, Answer]]], None] | None = None,
    ) -> list[Answer]:
        self.asked = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "contrast": contrast}
        for request in requests:
            exchange_of(request)  # marks and images agree
        prompts = [request.prompt for request in requests]
        self.prompts += prompts
        self.files += [list(request.images) for request in requests]
        opened = [[i if isinstance(i, Image.Image) else open_image(i) for i in r.images] for r in requests]
        self.shown += [[(i.size, i.getpixel((0, 0))) for i in images] for images in opened]
        answers = [Answer(self._text(prompt)) for prompt in prompts]
        for start in range(0, len(answers), batch_size):
            chosen = list(enumerate(answers))[::-1][start : start + batch_size]
            if on_batch:
                on_batch(chosen)
        return answers

    def _text(self, prompt: str) -> str:
        return next((text for part, text in self.says.items() if part in prompt), self.default)

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        opened = image if isinstance(image, Image.Image) else open_image(image)
        return Image.new("RGB", opened.size, (122, 116, 104))
