"""What a frozen vision encoder is to the rest of the library. Letters: i images, n tokens, d width, h w pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from vlmpeft.errors import ModelError


class VisionEncoder(Protocol):
    """(i, 3, h, w) -> (i, n, d). What the rest of the library reads from an encoder.

    width: d. grid: rows and columns of tokens; rows * columns == n. prefix_tokens: tokens before the grid (CLS,
    registers) that the model declares and `forward` drops. mean, std: per channel. image_size: side in pixels.
    """

    width: int
    grid: tuple[int, int]
    prefix_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int

    def __call__(self, pixel_values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """What a backbone wants to see. mean, std: per channel, of values in [0, 1]. size: side in pixels."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int


class Encoder(nn.Module):
    """What the encoders share: eval mode while frozen, no graph while frozen, one probe that settles grid and width.

    Args:
        backbone: the pretrained network.
        prefix_tokens: tokens before the grid, as the backbone declares them.
    """

    def __init__(self, backbone: nn.Module, prefix_tokens: int, pixels: Pixels) -> None:
        super().__init__()
        self.backbone, self.prefix_tokens = backbone, prefix_tokens
        self.mean, self.std, self.image_size = pixels.mean, pixels.std, pixels.size
        self.grid, self.width = (0, 0), 0

    def features(self, pixel_values: Tensor) -> Tensor:
        """(i, 3, h, w) -> (i, d, rows, columns) or (i, prefix + n, d), as the backbone gives it."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(i, 3, h, w) -> (i, n, d) without prefix tokens, in the backbone's dtype."""
        tuned = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and tuned):
            features = self.features(pixel_values.to(next(self.backbone.parameters()).dtype))
            if features.ndim == 4:
                return rearrange(features, "i d r c -> i (r c) d")
            return features[:, self.prefix_tokens :]

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode while frozen: batch statistics and dropout of a frozen encoder must not move."""
        tuned = any(p.requires_grad for p in self.backbone.parameters())
        super().train(mode and tuned)
        return self

    def probe(self, grid: tuple[int, int] | None) -> None:
        """Run one blank image and settle `grid` and `width`.

        Args: grid: what the model declares; None takes a square.
        Raises: ModelError M512 if the tokens do not fill the grid.
        """
        device = next(self.backbone.parameters()).device
        with torch.no_grad():
            raw = self.features(torch.zeros(1, 3, self.image_size, self.image_size, device=device))
        if raw.ndim == 4:
            self.grid, self.width = (raw.shape[2], raw.shape[3]), raw.shape[1]
            return
        tokens, self.width = raw.shape[1] - self.prefix_tokens, raw.shape[2]
        side = int(tokens**0.5)
        self.grid = grid or (side, side)
        if self.grid[0] * self.grid[1] != tokens:
            given = f"the encoder gives {raw.shape[1]} tokens, {self.prefix_tokens} of them declared before the grid"
            expected = f"{self.grid[0]}x{self.grid[1]} others expected."
            raise ModelError("M512", f"{given}; {expected}", "check vision.image_size and the declared prefix tokens.")

    @property
    def num_tokens(self) -> int:
        """n: tokens of one image."""
        return self.grid[0] * self.grid[1]
