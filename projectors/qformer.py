"""Q-Former of BLIP-2 (arXiv:2301.12597) without its text half: a small BERT of learned queries that read the image.

Letters: i images, n vision tokens, q queries, w width inside.
Names of submodules are those of transformers' BLIP-2, so that its tensors `query_tokens`, `qformer.*` and
`language_projection.*` load strictly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ConfigError
from vlmpeft.projectors.base import PROJECTORS
from vlmpeft.projectors.layers import FixedRMS, at_least_one, attend

EPS = 1e-12  # of BERT's LayerNorms
INIT_STD = 0.02  # of BERT's weights


def _residual_norm(inner: int, width: int) -> nn.ModuleDict:
    """The end of a BERT sublayer: a linear layer, and the LayerNorm after the residual."""
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=EPS)})


class Attention(nn.Module):
    """BERT's attention: queries (i, q, w) read a context (i, n, context_width); residual, then LayerNorm."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        widths = {"query": width, "key": context_width, "value": context_width}
        self.attention = nn.ModuleDict({name: nn.Linear(given, width) for name, given in widths.items()})
        self.output = _residual_norm(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(i, q, w), (i, n, context_width) -> (i, q, w)."""
        keys, values = self.attention["key"](context), self.attention["value"](context)
        read = attend(self.attention["query"](x), keys, values, self.heads)
        return self.output["LayerNorm"](self.output["dense"](read) + x)


class Layer(nn.Module):
    """Queries read each other, then (if `crosses`) the image, then pass a feed-forward."""

    def __init__(self, width: int, image_width: int, heads: int, ff_mult: int, *, crosses: bool) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads)
        self.crossattention = Attention(width, image_width, heads) if crosses else None
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, width * ff_mult)})
        self.output_query = _residual_norm(width * ff_mult, width)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """(i, q, w), (i, n, image_width) -> (i, q, w)."""
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, features)
        inner = F.gelu(self.intermediate_query["dense"](x))
        return self.output_query["LayerNorm"](self.output_query["dense"](inner) + x)


class QFormer(nn.Module):
    """LayerNorm over the queries, then `depth` layers; layers 0, cross_every, 2 * cross_every, ... read the image."""

    def __init__(self, width: int, image_width: int, heads: int, ff_mult: int, depth: int, cross_every: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width, eps=EPS)
        crosses = [index % cross_every == 0 for index in range(depth)]
        layers = nn.ModuleList(Layer(width, image_width, heads, ff_mult, crosses=yes) for yes in crosses)
        self.encoder = nn.ModuleDict({"layer": layers})
        self.apply(_init_as_bert)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """(i, q, w), (i, n, image_width) -> (i, q, w)."""
        x = self.layernorm(queries)
        for layer in self.encoder["layer"].children():
            x = layer(x, features)
        return x


@PROJECTORS.register("qformer")
class QFormerProjector(nn.Module):
    """Learned queries in a BERT that reads the image every `cross_every` layers, then a linear layer.

    (i, n, in_dim) -> (i, queries, out_dim), whatever n. The defaults have BLIP-2's sizes; BERT's init; no dropout.

    Args:
        queries: number of learned queries, which is the number of output tokens.
        depth: layers.
        width: inside, a multiple of `heads`.
        heads: attention heads.
        ff_mult: inner width of the feed-forward, as a multiple of width.
        cross_every: layers 0, cross_every, 2 * cross_every, ... read the image.
        rms: root mean square of every output token; 0 leaves them as they are.

    Raises:
        ConfigError: C102 if a count is < 1, heads does not divide width or rms < 0.

    Source: arXiv:2301.12597 section 3.1; transformers modeling_blip_2.py, Blip2QFormerModel.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *,
        queries: int = 32, depth: int = 12, width: int = 768, heads: int = 12, ff_mult: int = 4, cross_every: int = 2,
        rms: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least_one(queries=queries, depth=depth, width=width, heads=heads, ff_mult=ff_mult, cross_every=cross_every)
        if width % heads:
            raise ConfigError("C102", f"projector.width is {width}; allowed: a multiple of projector.heads={heads}.")
        self.query_tokens = nn.Parameter(torch.randn(1, queries, width) * INIT_STD)
        self.qformer = QFormer(width, in_dim, heads, ff_mult, depth, cross_every)
        self.language_projection = nn.Linear(width, out_dim)
        self.scale = FixedRMS(rms)

    def forward(self, features: Tensor) -> Tensor:
        """Project features: (i, n, in_dim) -> (i, queries, out_dim)."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        return self.scale(self.language_projection(self.qformer(queries, features)))

    def num_tokens(self, n: int) -> int:
        """`queries`, whatever n."""
        return self.query_tokens.shape[1]


def _init_as_bert(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)
