"""The projector of LLaVA 1.0: one linear layer."""

from __future__ import annotations

from torch import nn

from vlmpeft.projectors.base import PROJECTORS


@PROJECTORS.register("linear")
class LinearProjector(nn.Linear):
    """One linear layer, (i, n, in_dim) -> (i, n, out_dim).

    It is an nn.Linear so that LLaVA's mm_projector weights load: weight, bias. Source: arXiv:2304.08485.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)

    def num_tokens(self, n: int) -> int:
        """As many as come in."""
        return n
