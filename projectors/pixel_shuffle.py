"""Space-to-depth, then a linear layer or an MLP, as Idefics3, SmolVLM and InternVL shorten their images.

Letters: i images, n vision tokens, r c rows and columns of blocks, p q rows and columns inside a block, d width.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.projectors.base import PROJECTORS, Grid, grid_of
from vlmpeft.projectors.layers import FixedRMS, at_least_one, mlp_layers


@PROJECTORS.register("pixel_shuffle")
class PixelShuffleProjector(nn.Module):
    """Joins the features of factor x factor neighbouring patches into one token: factor 2 makes 144 of 24 x 24.

    (i, rows * columns, in_dim) -> (i, ceil(rows / factor) * ceil(columns / factor), out_dim). Sides that `factor` does
    not divide are filled up with zeros at the bottom and on the right, as VILA does (its base_projector.py).

    Args:
        factor: side of a block in patches.
        depth: number of linear layers. One has no bias, as in Idefics3 and SmolVLM; more make an MLP with GELU.
        rms: root mean square of every output token; 0 leaves them as they are.

    Raises:
        ConfigError: C102 if factor < 1, depth < 1 or rms < 0.
        ModelError: M513 for tokens that do not fill the grid or a grid smaller than a block (forward, num_tokens).

    Source: Idefics3, arXiv:2408.12637 section 2.2.3; transformers modeling_idefics3.py, Idefics3Connector.
    """

    input_grid: Grid | None = None

    def __init__(self, in_dim: int, out_dim: int, *, factor: int = 2, depth: int = 1, rms: float = 0.0) -> None:
        super().__init__()
        at_least_one(factor=factor)
        self.factor = factor
        self.projection = nn.Sequential(*mlp_layers(in_dim * factor**2, out_dim, depth, bias=depth > 1))
        self.scale = FixedRMS(rms)

    def forward(self, features: Tensor) -> Tensor:
        """Project features: (i, n, in_dim) -> (i, num_tokens(n), out_dim)."""
        k, (rows, columns) = self.factor, self._grid(features.shape[1])
        x = rearrange(features, "i (r c) d -> i r c d", r=rows)
        x = F.pad(x, (0, 0, 0, -columns % k, 0, -rows % k))  # last axis first
        blocks = rearrange(x, "i (r p) (c q) d -> i (r c) (p q d)", p=k, q=k)
        return self.scale(self.projection(blocks))

    def num_tokens(self, n: int) -> int:
        """ceil(rows / factor) * ceil(columns / factor). Raises: ModelError M513 as the class says."""
        return math.prod(self.output_grid(n))

    def output_grid(self, n: int) -> Grid:
        """Rows and columns of blocks. Raises: as `num_tokens`."""
        rows, columns = self._grid(n)
        return math.ceil(rows / self.factor), math.ceil(columns / self.factor)

    def _grid(self, n: int) -> Grid:
        rows, columns = grid_of(n, self.input_grid, "pixel_shuffle")
        if self.factor > min(rows, columns):
            most = min(rows, columns)
            even = [str(k) for k in range(1, most + 1) if rows % k == 0 and columns % k == 0]
            raise ModelError(
                "M513",
                f"projector 'pixel_shuffle' joins blocks of {self.factor}x{self.factor} vision tokens, "
                f"the grid is only {rows}x{columns}.",
                f"set projector.factor to {most} or less (to divide the grid without padding: {', '.join(even)}).",
            )
        return rows, columns
