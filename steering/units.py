"""The steering itself: one low-rank edit a layer, all layers' parameters in stacks.

Letters: b batch, s sequence, d width, l steered layers, r rank, p steered tokens of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.routing import Routing
from vlmpeft.steering.lowrank import LowRankEdit


@dataclass(frozen=True)
class Edit:
    """What one forward needs, computed once.

    index: (p,) flat positions. up: (d, r) of each layer. down: (r, d). bias: (r,).
    """

    index: Tensor
    up: Sequence[Tensor]
    down: Sequence[Tensor]
    bias: Sequence[Tensor]


def orthonormal(v: Tensor) -> Tensor:
    """Orthonormal bases of the columns of v, all layers at once: Q of a QR whose R has a positive diagonal.

    For r = 1 a normalisation, else by the Cholesky factor of the Gram matrix in fp64, which costs r^2 d a layer, needs
    no d x d buffer, and never waits for the device.
    Args: v: (l, d, r). Returns: (l, d, r) in v's dtype. Source: CholeskyQR, arXiv:1401.6000.
    """
    if v.shape[-1] == 1:
        return F.normalize(v, dim=1)
    wide = v.double()
    factor, _ = torch.linalg.cholesky_ex(wide.mT @ wide)  # (l, r, r), lower
    return torch.linalg.solve_triangular(factor, wide.mT, upper=False).mT.to(v.dtype)


class Units(nn.Module):
    """h' = h + U (A h + b - U^T h) at the chosen positions, with U orthonormal (MoReS, arXiv:2412.12359 eqs. 3, 4).

    Args:
        layers, width, rank: l, d, r.
        index_of: routing -> (p,) flat positions to steer.
        bias: whether there is a b.
        identity: start as the identity (A = U^T, b = 0); else as the published code does (A, b uniform in 1/sqrt(d)).
        constrained: False drops the tie and the constraint: h' = h + B (C h + b), B and C free.
        dropout: on the edit alone, never on h.
    """

    def __init__(
        self, layers: int, width: int, rank: int, index_of: Callable[[Routing], Tensor], *,
        bias: bool = True, identity: bool = True, constrained: bool = True, dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.index_of, self.constrained, self.dropout = index_of, constrained, dropout
        start = orthonormal(torch.randn(layers, width, rank, device=device))
        bound = 0.0 if identity else 1 / math.sqrt(width)
        self.rotation = nn.Parameter(start)  # (l, d, r); U is its orthonormal basis
        free = torch.empty(layers, rank, width, device=device).uniform_(-bound, bound)
        self.source = nn.Parameter(self._identity_source() if identity else free)  # (l, r, d)
        self.bias = nn.Parameter(torch.empty(layers, rank, device=device).uniform_(-bound, bound)) if bias else None

    @torch.no_grad()
    def _identity_source(self) -> Tensor:
        """A as U^T of the very tensor the forward uses, so that the edit is exactly zero; C = 0 where U is free."""
        return orthonormal(self.rotation).mT.clone() if self.constrained else torch.zeros_like(self.rotation.mT)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Units:
        """Go where the host model goes, but never below fp32: a basis rounded to 16 bits is none any more."""

        def kept(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return tensor.to(moved.device) if moved.element_size() < torch.float32.itemsize else moved

        super()._apply(kept, recurse)
        return self

    def edit(self, routing: Routing) -> Edit:
        """What all layers share in one forward: kept with the forward's routing, so that two forwards never mix."""
        if (found := routing.memo.get(self)) is None:
            up = orthonormal(self.rotation) if self.constrained else self.rotation
            down = self.source - up.mT if self.constrained else self.source
            bias = up.new_zeros(up.shape[0], up.shape[2]) if self.bias is None else self.bias
            found = Edit(self.index_of(routing), up.unbind(), down.unbind(), bias.unbind())
            routing.memo[self] = found
        return found

    def steer(self, hidden: Tensor, layer: int, edit: Edit) -> Tensor:
        """(b, s, d) -> (b, s, d): the edit of one layer, computed in fp32."""
        up, keep = edit.up[layer], None
        if self.training and self.dropout > 0:
            keep = F.dropout(up.new_ones(edit.index.shape[0], up.shape[0]), self.dropout)
        return LowRankEdit.apply(hidden, edit.index, up, edit.down[layer], edit.bias[layer], keep)

    def forward(self, hidden: Tensor, layer: int, routing: Routing) -> Tensor:
        """(b, s, d) -> (b, s, d), equal bit for bit at positions that are not steered."""
        with torch.autocast(hidden.device.type, enabled=False):
            edit = self.edit(routing)
            return hidden if edit.index.shape[0] == 0 else self.steer(hidden, layer, edit)
