"""OFT (arXiv:2306.07280), as OFTv2 (arXiv:2506.19847) computes it: the input is rotated, the weight stays as it is.

Letters: n blocks of width k, n k = d_in; d_out width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.quant_weight import plain_weight
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice
from vlmpeft.tuners.linear import AdaptedLinear, Where, check_linear, wrap_linears
from vlmpeft.tuners.peft_folder import check_settings, peft_settings
from vlmpeft.tuners.targets import ALL_LINEAR


class Rotation(nn.Module):
    """n rotations of width k by the Cayley map of skew-symmetric matrices, whose upper triangles are the parameters.

    Args: terms: of the series that stands for the map's inverse (OFTv2); 0 solves for it exactly.
    """

    def __init__(self, blocks: int, width: int, terms: int, device: torch.device) -> None:
        super().__init__()
        size = width * (width - 1) // 2
        self.weight = nn.Parameter(torch.zeros(blocks, size, device=device, dtype=torch.float32))
        self.width, self.terms = width, terms

    def forward(self) -> Tensor:
        """(n, k, k), fp32: (I - Q)(I + Q)^-1, or peft's series I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1)."""
        row, column = torch.triu_indices(self.width, self.width, 1, device=self.weight.device)
        upper = self.weight.new_zeros(len(self.weight), self.width, self.width)
        upper[:, row, column] = self.weight
        skew = upper - upper.mT
        identity = torch.eye(self.width, device=skew.device)
        if not self.terms:
            return torch.linalg.solve(identity + skew, identity - skew, left=False)
        total, power = identity, skew
        for _ in range(self.terms - 2):
            total, power = total + 2 * power, power @ skew
        return total + power


class OFTLinear(AdaptedLinear):
    """base(x R), with R block-diagonal and orthogonal, so that the weight's rows keep their angles; R starts as I."""

    def __init__(self, base: nn.Linear, block_size: int, terms: int) -> None:
        super().__init__(base)
        self.oft_R = Rotation(base.in_features // block_size, block_size, terms, base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """See `AdaptedLinear.forward`; where every token is rotated, the base runs once."""
        everywhere = self.slot is None and self.where == "all"
        return self.adapt(x, x) if everywhere and self.enabled and not self.merged else super().forward(x)

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`; `out` has no part in it."""
        with torch.autocast(x.device.type, enabled=False):
            blocks = rearrange(x.float(), "... (n k) -> ... n k", k=self.oft_R.width)
            turned = einsum(blocks, self.oft_R(), "... n i, n i j -> ... n j")
        adapted: Tensor = self.base_layer(rearrange(turned, "... n k -> ... (n k)").to(x.dtype))
        return adapted

    def delta(self) -> Tensor:
        """W R^T - W, (d_out, d_in), fp32."""
        weight = plain_weight(self).float()
        return weight @ torch.block_diag(*self.oft_R()).T - weight


@TUNERS.register("oft")
@dataclass(frozen=True)
class OFT:
    """Orthogonal rotations of the input of linear layers.

    Args:
        block_size: width of a rotation; divides every layer's input.
        targets, part, where, layers: as LoRA's.
        neumann: terms of the series for the Cayley map (peft's default is 5: cheaper, and orthogonal only nearly); 0,
            the default here, is exact.
        lr: learning rate of its own; the default is that of peft's comparison (MetaMathQA), where it is among the best.
    """

    kind: ClassVar[str] = "oft"
    block_size: int = 32
    targets: str | tuple[str, ...] = ALL_LINEAR
    part: str = "language"
    where: Where = "all"
    layers: Choice = EVERY
    neumann: int = 0
    lr: float | None = 1e-4

    def __post_init__(self) -> None:
        check_linear(self)
        check(self.block_size >= 2, "oft.block_size", self.block_size, "an integer of at least 2")
        check(self.neumann == 0 or self.neumann >= 4, "oft.neumann", self.neumann, "0, or an integer of at least 4")
        check(self.lr is None or 0 < self.lr <= 1, "oft.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: the rotations' parameters, by name. Raises: ModelError M551."""
        return wrap_linears(model, parts, self, self._layer)

    def _layer(self, base: nn.Linear) -> OFTLinear:
        if base.in_features % self.block_size:
            message = f"blocks of {self.block_size} do not divide a layer's input of {base.in_features}."
            divisors = [k for k in range(2, base.in_features + 1) if base.in_features % k == 0]
            nearest = min(divisors, key=lambda k: abs(k - self.block_size))
            raise ModelError("M551", message, f"set oft.block_size, for example to {nearest}.")
        return OFTLinear(base, self.block_size, self.neumann)

    @property
    def in_peft(self) -> bool:
        """`peft` acts on every token."""
        return self.where == "all"

    @property
    def _settings(self) -> dict[str, object]:
        terms = {"num_cayley_neumann_terms": self.neumann} if self.neumann else {}
        return {"r": 0, "oft_block_size": self.block_size, "use_cayley_neumann": bool(self.neumann), **terms}

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        return peft_settings("OFT", self.part, base, targets, **self._settings)

    def check_peft(self, folder: Path) -> None:
        """See `PeftForm.check_peft`."""
        check_settings(folder, "OFT", self._settings)
