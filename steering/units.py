"""The steering itself: one low-rank edit a layer, all layers' parameters in stacks.

Letters: b batch, s sequence, d width, l steered layers, r rank, p steered tokens of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.routing import Routing


@dataclass(frozen=True)
class Edit:
    """What one forward needs, computed once.

    index: (p,) flat positions. up: (l, d, r). down: (l, r, d). bias: (l, r).
    """

    index: Tensor
    up: Tensor
    down: Tensor
    bias: Tensor


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
            found = routing.memo[self] = Edit(self.index_of(routing), up, down, bias)
        return found

    def delta(self, hidden: Tensor, layer: int, edit: Edit) -> Tensor:
        """The edit of one layer before it is added, in fp32. Args: hidden (b, s, d). Returns: (p, d)."""
        steered = hidden.reshape(-1, hidden.shape[-1]).index_select(0, edit.index).to(edit.up.dtype)  # (p, d)
        low = torch.addmm(edit.bias[layer], steered, edit.down[layer].T)  # (p, r)
        return F.dropout(low @ edit.up[layer].T, self.dropout, self.training)

    def forward(self, hidden: Tensor, layer: int, routing: Routing) -> Tensor:
        """(b, s, d) -> (b, s, d), equal bit for bit at positions that are not steered."""
        with torch.autocast(hidden.device.type, enabled=False):
            edit = self.edit(routing)
            if edit.index.shape[0] == 0:
                return hidden
            delta = self.delta(hidden, layer, edit).to(hidden.dtype)
        return hidden.flatten(0, 1).index_add(0, edit.index, delta).view(hidden.shape)
