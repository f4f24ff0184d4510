"""Perceiver resampler of Flamingo (arXiv:2204.14198): learned latents read the image, however many tokens it has.

Letters: i images, n vision tokens, q latents, d width (= out_dim).
Names of submodules are TinyLLaVA_Factory's, so that the weights below its `connector._connector.` load strictly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmpeft.projectors.base import PROJECTORS
from vlmpeft.projectors.layers import FixedRMS, at_least_one, attend


class PerceiverAttention(nn.Module):
    """Latents attend to the image's tokens and to each other; both are normalised first. No biases."""

    def __init__(self, width: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * dim_head
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """(i, n, d), (i, q, d) -> (i, q, d)."""
        latents = self.norm_latents(latents)
        read = torch.cat((self.norm_media(tokens), latents), dim=1)  # (i, n + q, d)
        keys, values = self.to_kv(read).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), keys, values, self.heads))


class ResamplerLayer(nn.ModuleList):
    """Attention and a feed-forward without biases, each with a residual."""

    def __init__(self, width: int, heads: int, dim_head: int, ff_mult: int) -> None:
        widen = nn.Linear(width, width * ff_mult, bias=False)
        narrow = nn.Linear(width * ff_mult, width, bias=False)
        feed_forward = nn.Sequential(nn.LayerNorm(width), widen, nn.GELU(), narrow)
        super().__init__([PerceiverAttention(width, heads, dim_head), feed_forward])

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """(i, n, d), (i, q, d) -> (i, q, d)."""
        attention, feed_forward = self
        latents = latents + attention(tokens, latents)
        return latents + feed_forward(latents)


@PROJECTORS.register("resampler")
class ResamplerProjector(nn.Module):
    """A linear layer, then layers in which learned latents read the image.

    (i, n, in_dim) -> (i, queries, out_dim), whatever n. The order of the tokens does not matter to it: where a patch
    lies must be in its features, as a vision transformer's are.

    Args:
        queries: number of latents, which is the number of output tokens.
        depth: layers of attention and feed-forward.
        heads: attention heads.
        dim_head: width of a head.
        ff_mult: inner width of the feed-forward, as a multiple of out_dim.
        rms: root mean square of every output token; 0 leaves what the last LayerNorm gives (1 at first).

    Raises:
        ConfigError: C102 if a count is < 1 or rms < 0.

    Source: arXiv:2204.14198 section 2.1; TinyLLaVA_Factory connector/resampler.py.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *,
        queries: int = 128, depth: int = 3, heads: int = 8, dim_head: int = 64, ff_mult: int = 4, rms: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least_one(queries=queries, depth=depth, heads=heads, dim_head=dim_head, ff_mult=ff_mult)
        self.latents = nn.Parameter(torch.randn(queries, out_dim))
        self.linear = nn.Linear(in_dim, out_dim)
        self.layers = nn.ModuleList(ResamplerLayer(out_dim, heads, dim_head, ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(out_dim)
        self.scale = FixedRMS(rms)

    def forward(self, features: Tensor) -> Tensor:
        """Project features: (i, n, in_dim) -> (i, queries, out_dim)."""
        tokens = self.linear(features)
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(tokens, latents)
        return self.scale(self.norm(latents))

    def num_tokens(self, n: int) -> int:
        """`queries`, whatever n."""
        return len(self.latents)
