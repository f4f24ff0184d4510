"""DoRA (arXiv:2402.09353): the direction of a weight learns as in LoRA, its magnitude by itself.

Letters: r rank, d_in d_out widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmpeft.parts import Parts
from vlmpeft.quant_weight import plain_weight
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice
from vlmpeft.tuners.linear import AdaptedLinear, Where, check_linear, wrap_linears
from vlmpeft.tuners.lora_layers import fresh_pair
from vlmpeft.tuners.peft_folder import check_settings, peft_settings
from vlmpeft.tuners.ranks import PATTERNS, Ranks
from vlmpeft.tuners.targets import ALL_LINEAR, find_linears


class DoRALinear(AdaptedLinear):
    """m * (W + scale B A) x / |W + scale B A| + bias, with the norm that of each row, (d_out,), and m learned.

    As the paper's section 4.3 has it, the norm is a constant to the gradient. Under dropout all of the update, W's part
    included, sees the dropped input, as in the reference.
    """

    reads_weight = True

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.lora_A, self.lora_B = fresh_pair(base, r)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scale = scale
        self.lora_magnitude_vector = nn.Parameter(self.norm())
        self.train(base.training)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Norms of the rows of W + scale B A, (d_out,), fp32, without a (d_out, d_in) product.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T for a row w of W and its row b of B.
        """
        a, b = self.lora_A.weight, self.lora_B.weight * self.scale
        with torch.autocast(a.device.type, enabled=False):
            weight = plain_weight(self).float()
            crossed = (b * (weight @ a.T)).sum(1)
            squared = weight.square().sum(1) + 2 * crossed + (b @ (a @ a.T) * b).sum(1)
        return squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()  # a row of zeros stays one

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`."""
        seen = self.dropout(x)
        turned = out if seen is x else self.base_layer(seen)  # (..., d_out)
        bias = self.base_layer.bias
        turned = turned if bias is None else turned - bias
        ratio = self.lora_magnitude_vector / self.norm()
        update = self.lora_B(self.lora_A(self.in_own_dtype(seen))) * self.scale
        return (out + (ratio - 1) * turned + ratio * update).to(out.dtype)

    def delta(self) -> Tensor:
        """What merging adds to the base weight, (d_out, d_in), fp32."""
        ratio = (self.lora_magnitude_vector / self.norm())[:, None]
        return (ratio - 1) * plain_weight(self) + ratio * self.scale * (self.lora_B.weight @ self.lora_A.weight)


@TUNERS.register("dora")
@dataclass(frozen=True)
class DoRA:
    """Low-rank adapters of the weights' directions, and their magnitudes.

    Args:
        r, ranks, alpha, dropout, targets, part, rslora, where, layers: as LoRA's.
        lr: learning rate of its own; None is the run's, `optim.lr`: 2e-4 unless it is set, as LLaVA and QLoRA have it.
    """

    kind: ClassVar[str] = "dora"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    part: str = "language"
    rslora: bool = False
    where: Where = "all"
    layers: Choice = EVERY
    lr: float | None = None
    ranks: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        check_linear(self)
        self._ranks.check()
        check(0 <= self.dropout < 1, "dora.dropout", self.dropout, "a number in [0, 1)")
        check(self.lr is None or 0 < self.lr <= 1, "dora.lr", self.lr, "a number in (0, 1]")

    @property
    def _ranks(self) -> Ranks:
        return Ranks(self.kind, self.r, self.alpha, self.rslora, self.ranks)

    def resolved(self) -> DoRA:
        """The same tuner with alpha written out."""
        return self if self.ranks else dataclasses.replace(self, alpha=self._ranks.numerator(self.r))

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: A, B and the magnitude of each, by name."""
        ranks = self._ranks.by_layer(find_linears(model, parts, self.part, self.targets, self.layers))
        return wrap_linears(model, parts, self, lambda base: self._layer(base, ranks[id(base)]))

    def _layer(self, base: nn.Linear, r: int) -> DoRALinear:
        return DoRALinear(base, r, self._ranks.scale(r), self.dropout)

    @property
    def in_peft(self) -> bool:
        """`peft` acts on every token."""
        return self.where == "all"

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        settings = self._ranks.settings(targets)
        return peft_settings("LORA", self.part, base, targets, lora_dropout=self.dropout, use_dora=True, **settings)

    def check_peft(self, folder: Path) -> None:
        """See `PeftForm.check_peft`."""
        ours = PATTERNS if self.ranks else frozenset()
        config = check_settings(folder, "LORA", {"use_dora": True}, ours, numbers=("r", "lora_alpha"))
        self._ranks.check_folder(folder, config)
