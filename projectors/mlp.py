"""The projector of LLaVA 1.5: an MLP with exact GELU, named mlpNx_gelu for N linear layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from vlmpeft.errors import ConfigError
from vlmpeft.projectors.base import PROJECTORS


class MLPProjector(nn.Sequential):
    """Linear(in_dim, out_dim), then (depth - 1) times [GELU, Linear(out_dim, out_dim)], PyTorch's default init.

    (i, n, in_dim) -> (i, n, out_dim). It is an nn.Sequential so that LLaVA's mm_projector weights load: 0.weight,
    2.weight and so on.

    Args:
        depth: number of linear layers.

    Raises:
        ConfigError: C102 if depth < 1.

    Source: arXiv:2310.03744; LLaVA multimodal_projector/builder.py.
    """

    def __init__(self, in_dim: int, out_dim: int, *, depth: int = 2) -> None:
        if depth < 1:
            raise ConfigError("C102", f"projector depth is {depth}; allowed: 1 or more.")
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        super().__init__(*layers)

    def num_tokens(self, n: int) -> int:
        """As many as come in."""
        return n


@PROJECTORS.register_family(r"mlp([1-9][0-9]*)x_gelu", example="mlp2x_gelu")
def mlp_of_depth(depth: int) -> Callable[[int, int], MLPProjector]:
    """The factory behind mlpNx_gelu; the name fixes the depth, so it has no option."""

    def build(in_dim: int, out_dim: int) -> MLPProjector:
        return MLPProjector(in_dim, out_dim, depth=depth)

    return build
