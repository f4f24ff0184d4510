"""Lightweight downsampling projectors of MobileVLM: LDP (arXiv:2312.16886) and LDPv2 (arXiv:2402.03766).

Letters: i images, n vision tokens, h w grid of patches, c channels (= out_dim).
Names and indices of submodules are MobileVLM's, so that the weights below its `model.mm_projector.` load strictly.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmpeft.projectors.base import PROJECTORS, Grid, grid_of
from vlmpeft.projectors.layers import FixedRMS, at_least_one, mlp_layers


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (i, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position: (i, c, h, w) -> (i, c, h, w)."""
        return rearrange(super().forward(rearrange(x, "i c h w -> i h w c")), "i h w c -> i c h w")


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the mean over the grid. Source: arXiv:1905.02244."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(i, c, h, w) -> (i, c, h, w)."""
        mean = x.mean(dim=(2, 3), keepdim=True)  # (i, c, 1, 1)
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(mean))))


class InvertedResidual(nn.Module):
    """MobileNetV3 block with expansion 1 (no expanding conv), kernel 3; the residual exists only at stride 1.

    Source: arXiv:1905.02244; torchvision models/mobilenetv3.py.
    """

    def __init__(self, width: int, *, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, LayerNorm2d(width), nn.Hardswish()),
            SqueezeExcitation(width, _make_divisible(width // 4)),
            nn.Sequential(pointwise, LayerNorm2d(width)),
        )
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(i, c, h, w) -> (i, c, ceil(h / stride), ceil(w / stride))."""
        y = self.block(x)
        return x + y if self.residual else y


@PROJECTORS.register("ldp")
class LDPProjector(nn.Module):
    """Two-layer MLP, then two depthwise blocks; the second halves each side: 24 x 24 patches become 144 tokens.

    (i, rows * columns, in_dim) -> (i, ceil(rows / 2) * ceil(columns / 2), out_dim).

    Args:
        rms: root mean square of every output token; 0 leaves what the last LayerNorm gives (1 at first).

    Raises:
        ConfigError: C102 if rms < 0.
        ModelError: M513 if n tokens do not fill the grid (forward, num_tokens).

    Source: arXiv:2312.16886; MobileVLM vision_projector.py:11.
    """

    input_grid: Grid | None = None

    def __init__(self, in_dim: int, out_dim: int, *, rms: float = 0.0) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Identity(), *mlp_layers(in_dim, out_dim, depth=2))
        blocks = nn.Sequential(
            nn.Identity(), InvertedResidual(out_dim, stride=1), InvertedResidual(out_dim, stride=2)
        )  # index 0 is an Identity in MobileVLM too
        self.model = nn.ModuleDict({"mlp": mlp, "mb_block": blocks})
        self.scale = FixedRMS(rms)

    def forward(self, features: Tensor) -> Tensor:
        """Project features: (i, n, in_dim) -> (i, num_tokens(n), out_dim)."""
        rows, _ = grid_of(features.shape[1], self.input_grid, "ldp")
        x = rearrange(self.model["mlp"](features), "i (h w) c -> i c h w", h=rows)
        return self.scale(rearrange(self.model["mb_block"](x), "i c h w -> i (h w) c"))

    def num_tokens(self, n: int) -> int:
        """ceil(rows / 2) * ceil(columns / 2). Raises: ModelError M513 if n tokens do not fill the grid."""
        return math.prod(self.output_grid(n))

    def output_grid(self, n: int) -> Grid:
        """Half of each side. Raises: as `num_tokens`."""
        rows, columns = grid_of(n, self.input_grid, "ldp")
        return math.ceil(rows / 2), math.ceil(columns / 2)


@PROJECTORS.register("ldpv2")
class LDPv2Projector(nn.Module):
    """Two-layer MLP, average pooling to grid x grid, then a depthwise conv that adds position (PEG).

    (i, n, in_dim) -> (i, grid^2, out_dim).

    Args:
        grid: side of the pooled grid. Features of fewer than grid x grid patches are repeated to fill it, as
            MobileVLM does: for a 7 x 7 encoder choose grid=7 or less.
        rms: root mean square of every output token; 0 leaves them as they are.

    Raises:
        ConfigError: C102 if grid < 1 or rms < 0.
        ModelError: M513 if n tokens do not fill the encoder's grid (forward, num_tokens).

    Source: arXiv:2402.03766; MobileVLM vision_projector.py:90.
    """

    input_grid: Grid | None = None

    def __init__(self, in_dim: int, out_dim: int, *, grid: int = 12, rms: float = 0.0) -> None:
        super().__init__()
        at_least_one(grid=grid)
        self.grid = grid
        peg = nn.Sequential(nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim))  # arXiv:2102.10882
        self.mlp = nn.ModuleDict({"mlp": nn.Sequential(*mlp_layers(in_dim, out_dim, depth=2))})
        self.peg = nn.ModuleDict({"peg": peg})
        self.scale = FixedRMS(rms)

    def forward(self, features: Tensor) -> Tensor:
        """Project features: (i, n, in_dim) -> (i, grid^2, out_dim)."""
        rows, _ = grid_of(features.shape[1], self.input_grid, "ldpv2")
        x = self._pool(rearrange(self.mlp["mlp"](features), "i (h w) c -> i c h w", h=rows))  # (i, c, grid, grid)
        return self.scale(rearrange(x + self.peg["peg"](x), "i c h w -> i (h w) c"))

    def num_tokens(self, n: int) -> int:
        """grid^2, whatever n. Raises: ModelError M513 if n tokens do not fill the encoder's grid."""
        return math.prod(self.output_grid(n))

    def output_grid(self, n: int) -> Grid:
        """The pooled grid. Raises: as `num_tokens`."""
        grid_of(n, self.input_grid, "ldpv2")
        return self.grid, self.grid

    def _pool(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        if rows % self.grid == 0 and columns % self.grid == 0:
            # the same mean; unlike adaptive pooling, its CUDA backward is deterministic
            return F.avg_pool2d(x, (rows // self.grid, columns // self.grid))
        return F.adaptive_avg_pool2d(x, self.grid)


def _make_divisible(width: int, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `width`, not below 90% of it. Source: torchvision models/_utils.py."""
    rounded = max(divisor, (width + divisor // 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded
