"""The `eval` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmpeft.tuners.base import check


@dataclass(frozen=True)
class EvalConfig:
    """Questions asked before the first stage, after the last, and once more without the image they are about.

    questions: files, comma-separated. blank: ask once more about blank images. ablate: and about other ones ("shuffle")
    or noise ("noise").
    """

    questions: str | None = None
    images: str | None = None
    suffix: str = "\nAnswer the question using a single word or phrase."
    max_new_tokens: int = 16
    batch_size: int = 16
    blank: bool = True
    ablate: tuple[Literal["shuffle", "noise"], ...] = ()

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, "eval.max_new_tokens", self.max_new_tokens, "at least 1")
        check(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")

    @property
    def ablations(self) -> tuple[str, ...]:
        """What is shown instead of the images, in turn."""
        return (("blank",) if self.blank else ()) + tuple(dict.fromkeys(self.ablate))
