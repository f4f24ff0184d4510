"""The projector of LLaVA 1.0: one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from vlmpeft.projectors.base import PROJECTORS
from vlmpeft.projectors.layers import FixedRMS


@PROJECTORS.register("linear")
class LinearProjector(nn.Linear):
    """One linear layer, (i, n, in_dim) -> (i, n, out_dim).

    It is an nn.Linear so that LLaVA's mm_projector weights load: weight, bias. Source: arXiv:2304.08485.

    Args:
        rms: root mean square of every output token; 0 leaves them as they are.
    """

    def __init__(self, in_dim: int, out_dim: int, *, rms: float = 0.0) -> None:
        super().__init__(in_dim, out_dim)
        self.scale = FixedRMS(rms)

    def forward(self, features: Tensor) -> Tensor:
        """Project features: (i, n, in_dim) -> (i, n, out_dim)."""
        return self.scale(super().forward(features))

    def num_tokens(self, n: int) -> int:
        """As many as come in."""
        return n
