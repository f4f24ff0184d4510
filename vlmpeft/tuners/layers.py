"""Full tuning of some decoder blocks: the last ones, the first and the last, every so many, or a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice, check_choice, which_blocks
from vlmpeft.tuners.substitute import retrain


@TUNERS.register("layers")
@dataclass(frozen=True)
class LayerTuning:
    """Train every weight of some blocks of the language model, as fp32 copies.

    Args:
        which: as LoRA's `layers`, but not all of them.
        lr: learning rate of its own; the default is LLaVA's for full tuning (arXiv:2304.08485).
    """

    kind: ClassVar[str] = "layers"
    which: Choice = "last:2"
    lr: float | None = 2e-5

    def __post_init__(self) -> None:
        check(self.which != EVERY, "layers.which", self.which, "a choice of blocks, or use the tuner full")
        check_choice(self.which, "layers.which")
        check(self.lr is None or 0 < self.lr <= 1, "layers.lr", self.lr, "a number in (0, 1]")

    @property
    def part(self) -> str:
        """Where the blocks are."""
        return "language"

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the layers of the blocks. Returns: their parameters, by name."""
        numbers = which_blocks(self.which, len(parts.blocks), "layers.which")
        return retrain(model, [parts.blocks[n] for n in numbers], lambda module, name: True)
