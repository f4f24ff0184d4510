"""Norm tuning (arXiv:2312.11420): scales and shifts of a part's normalisation layers, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check, check_part
from vlmpeft.tuners.sites import is_norm
from vlmpeft.tuners.substitute import retrain


@TUNERS.register("norm")
@dataclass(frozen=True)
class NormTuning:
    """Train every weight and bias of the norms of a part, as fp32 copies: layer, RMS and group norms of any library.

    Args:
        part: "language" (its last norm included), "vision", "projector" or "lm_head".
        lr: learning rate of its own; the default is the least that IA3, which scales as norms do, is run at (1e-3 to
            3e-3). At LoRA's 1e-4 norms learn nothing in peft's comparison of methods (MetaMathQA).
    """

    kind: ClassVar[str] = "norm"
    part: str = "language"
    lr: float | None = 1e-3

    def __post_init__(self) -> None:
        check_part(self.part, "norm.part")
        check(self.lr is None or 0 < self.lr <= 1, "norm.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the norms. Returns: their weights and biases, by name. Raises: ModelError M551 if there are none."""
        trained = retrain(model, [parts.get(self.part)], lambda module, name: is_norm(module))
        if not trained:
            fix = "use a tuner of kind lora or full there."
            raise ModelError("M551", f"the {self.part} has no norms with weights to train.", fix)
        return trained
