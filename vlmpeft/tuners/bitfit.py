"""BitFit (arXiv:2106.10199): the biases of a part, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check, check_part
from vlmpeft.tuners.substitute import retrain


@TUNERS.register("bitfit")
@dataclass(frozen=True)
class BitFit:
    """Train the biases of a part, those of its norms included, as fp32 copies.

    Args:
        part: "language", "vision", "projector" or "lm_head"; language models of the LLaMA kind have none.
        lr: learning rate of its own; the default is the largest of those the paper searched (its section 4).
    """

    kind: ClassVar[str] = "bitfit"
    part: str = "language"
    lr: float | None = 1e-3

    def __post_init__(self) -> None:
        check_part(self.part, "bitfit.part")
        check(self.lr is None or 0 < self.lr <= 1, "bitfit.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the layers with biases. Returns: these, by name. Raises: ModelError M551 if there are none."""
        trained = retrain(model, [parts.get(self.part)], lambda module, name: name.endswith("bias"))
        if not trained:
            fix = "use a tuner of kind norm, ia3 or lora there, or bitfit with part=vision or projector."
            raise ModelError("M551", f"the {self.part} has no biases to train.", fix)
        return trained
