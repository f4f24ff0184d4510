"""The projector of LLaVA 1.5: an MLP with exact GELU, named mlpNx_gelu for N linear layers."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ConfigError
from vlmpeft.projectors.base import PROJECTORS
from vlmpeft.projectors.layers import FixedRMS, mlp_layers


class MLPProjector(nn.Sequential):
    """Linear(in_dim, out_dim), then (depth - 1) times [GELU, Linear(out_dim, out_dim)], PyTorch's default init.

    (i, n, in_dim) -> (i, n, out_dim). It is an nn.Sequential so that LLaVA's mm_projector weights load: 0.weight,
    2.weight and so on.

    Args:
        depth: number of linear layers.
        rms: root mean square every output token is brought to; 0 leaves the output as it is, as LLaVA does. At the
            scale of the language model's embeddings, image tokens do not drown what its blocks add to them.
        dropout: share of the vision features that training drops: with few images, against learning them by heart.

    Raises:
        ConfigError: C102 if depth < 1, rms < 0 or dropout is no share.

    Source: arXiv:2310.03744; LLaVA multimodal_projector/builder.py.
    """

    def __init__(self, in_dim: int, out_dim: int, *, depth: int = 2, rms: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__(*mlp_layers(in_dim, out_dim, depth), *([FixedRMS(rms)] if rms else []))
        if not 0 <= dropout < 1:
            raise ConfigError("C102", f"projector.dropout is {dropout}; allowed: 0 or more, below 1.")
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        """Project features: (i, n, in_dim) -> (i, n, out_dim)."""
        out: Tensor = super().forward(F.dropout(features, self.dropout, self.training))
        return out

    def num_tokens(self, n: int) -> int:
        """As many as come in."""
        return n


@PROJECTORS.register_family(r"mlp([1-9][0-9]*)x_gelu", example="mlp2x_gelu")
def mlp_of_depth(depth: int) -> Callable[..., MLPProjector]:
    """The factory behind mlpNx_gelu; the name fixes the depth, so it is no option."""

    def build(in_dim: int, out_dim: int, *, rms: float = 0.0, dropout: float = 0.0) -> MLPProjector:
        return MLPProjector(in_dim, out_dim, depth=depth, rms=rms, dropout=dropout)

    return build
