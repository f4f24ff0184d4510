"""VeRA (arXiv:2310.11454): one frozen random pair A, B for all layers; every layer learns two vectors that scale it.

Letters: r rank, d_in d_out widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice
from vlmpeft.tuners.linear import AdaptedLinear, Where, check_linear, wrap_linears
from vlmpeft.tuners.peft_folder import check_settings, peft_settings
from vlmpeft.tuners.targets import ALL_LINEAR, find_linears


class Projections(nn.Module):
    """The shared A (r, d_in) and B (d_out, r), wide enough for every layer, drawn as peft draws them; never saved."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, r: int, d_in: int, d_out: int, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("vera_A", (r, d_in)), ("vera_B", (d_out, r))):
            bound = math.sqrt(6 / shape[1])  # Kaiming-uniform with gain sqrt(2); peft's vera/model.py:_kaiming_init
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(device), persistent=False)


class VeRALinear(AdaptedLinear):
    """base(x) + b * (B (d * (A dropout(x)))), with d (r,) and b (d_out,) learned; b from zero: it starts as its base.

    Args: shared: A and B; a layer uses the first d_in columns of A and the first d_out rows of B.
    """

    def __init__(self, base: nn.Linear, shared: Projections, d_initial: float, dropout: float) -> None:
        super().__init__(base)
        options: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.shared = shared
        self.vera_lambda_b = nn.Parameter(torch.zeros(base.out_features, **options))
        self.vera_lambda_d = nn.Parameter(torch.full((len(shared.vera_A),), d_initial, **options))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.train(base.training)

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`."""
        a, b = self._slices()
        low = self.vera_lambda_d * F.linear(self.dropout(self.in_own_dtype(x)), a)  # (..., r)
        return (out + self.vera_lambda_b * F.linear(low, b)).to(out.dtype)

    def delta(self) -> Tensor:
        """diag(b) B diag(d) A, (d_out, d_in), fp32."""
        a, b = self._slices()
        return (self.vera_lambda_b[:, None] * b) @ (self.vera_lambda_d[:, None] * a)

    def _slices(self) -> tuple[Tensor, Tensor]:
        return self.shared.vera_A[:, : self.in_features], self.shared.vera_B[: self.out_features]


@TUNERS.register("vera")
@dataclass(frozen=True)
class VeRA:
    """Two learned vectors a layer around a random pair that all layers share.

    Args:
        r: rank of the pair; more than LoRA's, as it costs a number a layer.
        d_initial: start of the inner vector.
        dropout: on the adapter's input.
        targets, part, where, layers: as LoRA's.
        seed: of the pair, which no file holds.
        lr: learning rate of its own; the default is the paper's for instruction tuning, ten times LoRA's there.
    """

    kind: ClassVar[str] = "vera"
    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    part: str = "language"
    where: Where = "all"
    layers: Choice = EVERY
    seed: int = 0
    lr: float | None = 4e-3

    def __post_init__(self) -> None:
        check_linear(self)
        check(self.r >= 1, "vera.r", self.r, "an integer of at least 1")
        check(0 < self.d_initial <= 1, "vera.d_initial", self.d_initial, "a number in (0, 1]")
        check(0 <= self.dropout < 1, "vera.dropout", self.dropout, "a number in [0, 1)")
        check(self.seed >= 0, "vera.seed", self.seed, "an integer of at least 0")
        check(self.lr is None or 0 < self.lr <= 1, "vera.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers around one pair. Returns: both vectors of each, by name."""
        layers: list[Any] = list(find_linears(model, parts, self.part, self.targets, self.layers).values())
        d_in, d_out = (max(getattr(layer, f"{side}_features", 0) for layer in layers) for side in ("in", "out"))
        device = next(parts.get(self.part).parameters()).device
        shared = Projections(self.r, d_in, d_out, self.seed, device)
        return wrap_linears(model, parts, self, lambda base: VeRALinear(base, shared, self.d_initial, self.dropout))

    @property
    def in_peft(self) -> bool:
        """`peft` acts on every token."""
        return self.where == "all"

    @property
    def _settings(self) -> dict[str, object]:
        return {"r": self.r, "projection_prng_key": self.seed, "save_projection": False}

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        options = {"d_initial": self.d_initial, "vera_dropout": self.dropout}
        return peft_settings("VERA", self.part, base, targets, **self._settings, **options)

    def check_peft(self, folder: Path) -> None:
        """See `PeftForm.check_peft`."""
        check_settings(folder, "VERA", self._settings)
