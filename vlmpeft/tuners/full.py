"""Full tuning of one part: every parameter of it, in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, path_of
from vlmpeft.quant_weight import refuse_training
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import TUNERS, check, check_part


@TUNERS.register("full")
@dataclass(frozen=True)
class Full:
    """Train every parameter of a part. Weights become fp32: at a learning rate of 2e-5 most updates round away in bf16.

    Args:
        part: "projector", "language", "vision" or "lm_head".
        lr: learning rate of its own; None is the run's, `optim.lr`. LLaVA: 1e-3 for a fresh projector, 2e-5 after.
    """

    kind: ClassVar[str] = "full"
    part: str = "projector"
    lr: float | None = None

    def __post_init__(self) -> None:
        check_part(self.part, "full.part")
        check(self.lr is None or 0 < self.lr <= 1, "full.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Bring the part to fp32. Returns: its parameters by name; adapters already in it are not its own.

        Raises: ModelError M551 if the part has none; M559 if they are quantised.
        """
        module = parts.get(self.part)
        refuse_training(module, dict(module.named_parameters()))
        prefix = path_of(model, module)
        attached = (m for m in module.modules() if isinstance(m, Attachment))
        others = {id(p) for one in attached for p in one.own_parameters().values()}
        trained: dict[str, nn.Parameter] = {}
        for name, parameter in module.named_parameters():
            if id(parameter) not in others:
                parameter.data = parameter.data.to(torch.float32)
                trained[f"{prefix}.{name}" if prefix else name] = parameter
        if not trained:
            raise ModelError("M551", f"the {self.part} has no weights to train.", "drop this tuner.")
        return trained
