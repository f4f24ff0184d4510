"""Gradual unfreezing (ULMFiT, arXiv:1801.06146): the top blocks train first, those below join later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

from torch import nn

from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.substitute import Retrained, retrain


@TUNERS.register("unfreeze")
@dataclass(frozen=True)
class GradualUnfreezing:
    """Train groups of blocks of the language model, as fp32 copies, each from a step of its own on.

    Args:
        groups: blocks in each group, from the top of the model down.
        steps: the optimizer step of the stage, from 0, at which each group begins to train; none trains before.
        lr: learning rate of its own; the default is LLaVA's for full tuning (arXiv:2304.08485).
    """

    kind: ClassVar[str] = "unfreeze"
    groups: tuple[int, ...] = (1, 1)
    steps: tuple[int, ...] = (0, 100)
    lr: float | None = 2e-5

    def __post_init__(self) -> None:
        check(bool(self.groups) and min(self.groups) >= 1, "unfreeze.groups", self.groups, "integers of at least 1")
        ascending = self.steps[:1] == (0,) and all(a < b for a, b in pairwise(self.steps))
        same = len(self.steps) == len(self.groups)
        check(ascending and same, "unfreeze.steps", self.steps, "0 and rising steps, one for each of unfreeze.groups")
        check(self.lr is None or 0 < self.lr <= 1, "unfreeze.lr", self.lr, "a number in (0, 1]")

    @property
    def part(self) -> str:
        """Where the blocks are."""
        return "language"

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the layers of all groups. Returns: their parameters, by name."""
        blocks = [block for group in self._grouped(parts.blocks) for block in group]
        return retrain(model, blocks, lambda module, name: True)

    def before_step(self, parts: Parts, step: int) -> None:
        """See `BeforeStep.before_step`: a group whose step has not come gets no gradients, and no optimizer state."""
        for group, first in zip(self._grouped(parts.blocks), self.steps, strict=True):
            for layer in (m for block in group for m in block.modules()):
                if isinstance(layer, Retrained):
                    layer.trained.requires_grad_(step >= first)

    def _grouped(self, blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
        """Blocks by group, top first. Raises: ConfigError C102 if there are fewer than the groups ask for."""
        allowed = f"{len(blocks)} blocks in all at most, which the model has"
        check(sum(self.groups) <= len(blocks), "unfreeze.groups", self.groups, allowed)
        top = list(blocks)[::-1]
        return [top[a:b] for a, b in pairwise([0, *accumulate(self.groups)])]
