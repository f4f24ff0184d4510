"""Full tuning of some decoder blocks: the last ones, the first and the last, every so many, or a list."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.substitute import retrain

FORMS = r"(last|every):[1-9]\d*|first_last:[1-9]\d*,[1-9]\d*"


@TUNERS.register("layers")
@dataclass(frozen=True)
class LayerTuning:
    """Train every weight of some blocks of the language model, as fp32 copies.

    Args:
        which: "last:N", "first_last:N,M", "every:K" (blocks 0, K, 2K, ...) or a list of block numbers.
        lr: learning rate of its own; the default is LLaVA's for full tuning (arXiv:2304.08485).
    """

    kind: ClassVar[str] = "layers"
    which: str | tuple[int, ...] = "last:2"
    lr: float | None = 2e-5

    def __post_init__(self) -> None:
        known = bool(re.fullmatch(FORMS, self.which) if isinstance(self.which, str) else self.which)
        check(known, "layers.which", self.which, "last:N, first_last:N,M, every:K or a list of block numbers")
        check(self.lr is None or 0 < self.lr <= 1, "layers.lr", self.lr, "a number in (0, 1]")

    @property
    def part(self) -> str:
        """Where the blocks are."""
        return "language"

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the layers of the blocks. Returns: their parameters, by name."""
        numbers = which_blocks(self.which, len(parts.blocks))
        return retrain(model, [parts.blocks[n] for n in numbers], lambda module, name: True)


def which_blocks(which: str | Sequence[int], count: int) -> list[int]:
    """Block numbers of `count`, ascending. Raises: ConfigError C102 for blocks that are not there."""
    numbers = _numbers(which, count)
    allowed = f"blocks 0 to {count - 1}, which the model has"
    check(all(0 <= n < count for n in numbers), "layers.which", which, allowed)
    return sorted(set(numbers))


def _numbers(which: str | Sequence[int], count: int) -> Sequence[int]:
    if not isinstance(which, str):
        return [n + count if n < 0 else n for n in which]
    form, _, values = which.partition(":")
    first, last = ([int(n) for n in values.split(",")] * 2)[:2]
    if form == "last":
        return range(count - last, count)
    if form == "every":
        return range(0, count, first)
    return [*range(first), *range(count - last, count)]
