"""The projector of LLaVA 1.5: an MLP with exact GELU, named mlpNx_gelu for N linear layers."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ConfigError
from vlmpeft.projectors.base import PROJECTORS


class FixedRMS(nn.Module):
    """Scale each token to one root mean square. (..., d) -> (..., d); no parameters."""

    def __init__(self, rms: float) -> None:
        super().__init__()
        self.rms = rms

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens * rms / sqrt(mean(tokens^2))."""
        return F.rms_norm(tokens, tokens.shape[-1:]) * self.rms


class MLPProjector(nn.Sequential):
    """Linear(in_dim, out_dim), then (depth - 1) times [GELU, Linear(out_dim, out_dim)], PyTorch's default init.

    (i, n, in_dim) -> (i, n, out_dim). It is an nn.Sequential so that LLaVA's mm_projector weights load: 0.weight,
    2.weight and so on.

    Args:
        depth: number of linear layers.
        rms: root mean square every output token is brought to; 0 leaves the output as it is, as LLaVA does. At the
            scale of the language model's embeddings, image tokens do not drown what its blocks add to them.

    Raises:
        ConfigError: C102 if depth < 1 or rms < 0.

    Source: arXiv:2310.03744; LLaVA multimodal_projector/builder.py.
    """

    def __init__(self, in_dim: int, out_dim: int, *, depth: int = 2, rms: float = 0.0) -> None:
        if rms < 0:
            raise ConfigError("C102", f"projector.rms is {rms}; allowed: 0 or more.")
        if depth < 1:
            raise ConfigError("C102", f"projector depth is {depth}; allowed: 1 or more.")
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        super().__init__(*layers, *([FixedRMS(rms)] if rms else []))

    def num_tokens(self, n: int) -> int:
        """As many as come in."""
        return n


@PROJECTORS.register_family(r"mlp([1-9][0-9]*)x_gelu", example="mlp2x_gelu")
def mlp_of_depth(depth: int) -> Callable[..., MLPProjector]:
    """The factory behind mlpNx_gelu; the name fixes the depth, so `rms` is its only option."""

    def build(in_dim: int, out_dim: int, *, rms: float = 0.0) -> MLPProjector:
        return MLPProjector(in_dim, out_dim, depth=depth, rms=rms)

    return build
