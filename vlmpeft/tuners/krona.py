"""KronA (arXiv:2212.10650): the weight update is one Kronecker product, of full rank with few parameters.

Letters: A (p, q), B (s, t), p s = d_out, q t = d_in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice
from vlmpeft.tuners.linear import AdaptedLinear, Where, check_linear, wrap_linears
from vlmpeft.tuners.peft_folder import check_settings, peft_settings
from vlmpeft.tuners.targets import ALL_LINEAR

FULL = 2**20
"""A rank above every width: with it peft's LoKr keeps both factors whole, which is KronA."""


class KronALinear(AdaptedLinear):
    """base(x) + scale * (A kron B) x. A starts at zero and B Kaiming-uniform, so that the layer starts as its base."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__(base)
        (p, s), (q, t) = factors(base.out_features), factors(base.in_features)
        options: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lokr_w1 = nn.Parameter(torch.zeros(p, q, **options))
        self.lokr_w2 = nn.Parameter(torch.empty(s, t, **options))
        nn.init.kaiming_uniform_(self.lokr_w2, a=math.sqrt(5))
        self.scale = scale

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`; the product itself is never formed: (A kron B) vec(X) = vec(A X B^T)."""
        rows = rearrange(self.in_own_dtype(x), "... (q t) -> ... q t", q=self.lokr_w1.shape[1])
        update = rearrange(self.lokr_w1 @ (rows @ self.lokr_w2.T), "... p s -> ... (p s)")
        return (out + update * self.scale).to(out.dtype)

    def delta(self) -> Tensor:
        """scale * (A kron B), (d_out, d_in), fp32."""
        return torch.kron(self.lokr_w1, self.lokr_w2) * self.scale


def factors(width: int) -> tuple[int, int]:
    """The two factors of a width that are nearest each other, the smaller first."""
    small = next(m for m in range(math.isqrt(width), 0, -1) if width % m == 0)
    return small, width // small


@TUNERS.register("krona")
@dataclass(frozen=True)
class KronA:
    """Kronecker products beside linear layers; each factor's sides are as near the root of the layer's as they divide.

    Args:
        scale: on the update.
        targets, part, where, layers: as LoRA's.
        lr: learning rate of its own; the default is that of LoKr, the same product, in peft's comparison (MetaMathQA).
    """

    kind: ClassVar[str] = "krona"
    scale: float = 1.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    part: str = "language"
    where: Where = "all"
    layers: Choice = EVERY
    lr: float | None = 3e-3

    def __post_init__(self) -> None:
        check_linear(self)
        check(0 < self.scale < math.inf, "krona.scale", self.scale, "a number above 0")
        check(self.lr is None or 0 < self.lr <= 1, "krona.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: both factors of each, by name."""
        return wrap_linears(model, parts, self, lambda base: KronALinear(base, self.scale))

    @property
    def in_peft(self) -> bool:
        """`peft` acts on every token."""
        return self.where == "all"

    @property
    def _settings(self) -> dict[str, object]:
        return {"r": FULL, "alpha": self.scale * FULL, "decompose_factor": -1}

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        return peft_settings("LOKR", self.part, base, targets, **self._settings)

    def check_peft(self, folder: Path) -> None:
        """See `PeftForm.check_peft`."""
        check_settings(folder, "LOKR", self._settings)
