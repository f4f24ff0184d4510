"""What several projectors share. Letters: i images, q queries, k keys, d width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ConfigError


def at_least_one(**options: int) -> None:
    """Refuse counts below 1. Raises: ConfigError C102 naming the option."""
    for name, value in options.items():
        if value < 1:
            raise ConfigError("C102", f"projector.{name} is {value}; allowed: 1 or more.")


class FixedRMS(nn.Module):
    """Scale each token to one root mean square. (..., d) -> (..., d); no parameters.

    Args:
        rms: 0 leaves tokens as they are.

    Raises:
        ConfigError: C102 if rms < 0.
    """

    def __init__(self, rms: float) -> None:
        super().__init__()
        if rms < 0:
            raise ConfigError("C102", f"projector.rms is {rms}; allowed: 0 or more.")
        self.rms = rms

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens * rms / sqrt(mean(tokens^2))."""
        return F.rms_norm(tokens, tokens.shape[-1:]) * self.rms if self.rms else tokens


def mlp_layers(in_dim: int, out_dim: int, depth: int, *, bias: bool = True) -> list[nn.Module]:
    """Linear(in_dim, out_dim), then (depth - 1) times [GELU, Linear(out_dim, out_dim)], PyTorch's default init.

    Raises: ConfigError C102 if depth < 1.
    """
    at_least_one(depth=depth)
    layers: list[nn.Module] = [nn.Linear(in_dim, out_dim, bias=bias)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_dim, out_dim, bias=bias)]
    return layers


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Multi-head attention: (i, q, d), (i, k, d), (i, k, d) -> (i, q, d), each head d / heads wide."""
    q, k, v = (x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
