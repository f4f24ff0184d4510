"""What a frozen vision encoder is to the rest of the library. Letters: i images, n tokens, d width, h w pixels."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from vlmpeft.errors import ModelError, nearest

Triple = tuple[float, float, float]
RANDOM = "random"  # vision.weights=random: untrained weights, for smoke tests
TINYLLAVA_SIGLIP = "tinyllava_siglip"  # vision.compat: see `Encoder.drop_first_patch`

MARK = "(left)"  # no module has such a name: see `Encoder.run_order`


class VisionEncoder(Protocol):
    """(i, 3, h, w) -> (i, n, d). What the rest of the library reads from an encoder.

    width: d. grid: rows and columns of patches, which come row by row. num_tokens: n, rows * columns unless
    `vision.compat` drops a patch. prefix_tokens: tokens before the grid (CLS, registers) that the model declares and
    `forward` drops. mean, std: per channel. image_size: side in pixels.
    """

    width: int
    grid: tuple[int, int]
    prefix_tokens: int
    mean: Triple
    std: Triple
    image_size: int

    @property
    def num_tokens(self) -> int: ...

    def __call__(self, pixel_values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """What a backbone wants to see. mean, std: per channel, of values in [0, 1]. size: side in pixels."""

    mean: Triple
    std: Triple
    size: int


@dataclass(frozen=True)
class Loaded:
    """A backbone with its weights, and what it declares of its pixels; None where it declares nothing."""

    backbone: nn.Module
    mean: Triple | None = None
    std: Triple | None = None
    size: int | None = None


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
        self.grid, self.width, self.dropped_patches = (0, 0), 0, 0

    def features(self, pixel_values: Tensor) -> Tensor:
        """(i, 3, h, w) -> (i, d, rows, columns) or (i, prefix + n, d), as the backbone gives it."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(i, 3, h, w) -> (i, n, d) without prefix tokens, in the backbone's dtype."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tuned()):
            features = self.features(pixel_values.to(next(self.backbone.parameters()).dtype))
            if features.ndim == 4:
                tokens = rearrange(features, "i d r c -> i (r c) d")
            else:
                tokens = features[:, self.prefix_tokens :]
            return tokens[:, self.dropped_patches :]

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode while frozen: batch statistics and dropout of a frozen encoder must not move."""
        super().train(mode and self._tuned())
        return self

    def _tuned(self) -> bool:
        return any(p.requires_grad for p in self.backbone.parameters())

    def blank(self) -> Tensor:
        """Features of one blank image. Raises: ModelError M549 if the backbone takes no image of this size."""
        parameter, side = next(self.backbone.parameters()), self.image_size
        try:
            with torch.no_grad():
                return self.features(torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            refusal = f"the encoder takes no image of {side}x{side} pixels: {reason}"
            raise ModelError("M549", refusal, "set vision.image_size to one it takes, or leave it out.") from error

    def run_order(self, mark: nn.Module | None = None) -> list[str]:
        """Names of the backbone's modules in the order in which one blank image enters them.

        Args: mark: where the image leaves this module, the list holds MARK.
        """
        order: list[str] = []
        with contextlib.ExitStack() as hooks:
            for name, module in self.backbone.named_modules():
                hooks.enter_context(module.register_forward_pre_hook(lambda m, a, name=name: order.append(name)))
            if mark is not None:
                hooks.enter_context(mark.register_forward_hook(lambda m, a, out: order.append(MARK)))
            self.blank()
        return order

    def probe(self, grid: tuple[int, int] | None = None) -> None:
        """Run one blank image and settle `grid` and `width`.

        Args: grid: what the model declares; None takes a square.
        Raises: ModelError M512 if the tokens do not fill the grid, M549 as `blank`.
        """
        raw = self.blank()
        if raw.ndim == 4:
            self.grid, self.width = (raw.shape[2], raw.shape[3]), raw.shape[1]
            return
        tokens, self.width = raw.shape[1] - self.prefix_tokens, raw.shape[2]
        side = math.isqrt(max(tokens, 0))
        self.grid = grid or (side, side)
        if self.grid[0] * self.grid[1] != tokens or not tokens:
            given = f"the encoder gives {raw.shape[1]} tokens, {self.prefix_tokens} of them declared before the grid"
            expected = f"{self.grid[0]}x{self.grid[1]} others expected."
            fix = "check vision.image_size and the prefix tokens the model declares, or try another vision.layer."
            raise ModelError("M512", f"{given}; {expected}", fix)

    def drop_first_patch(self) -> None:
        """Leave out the top left patch, as TinyLLaVA did of SigLIP: 728 tokens that fill no grid.

        Its base tower drops token 0 of every encoder, and SigLIP has no CLS token there (TinyLLaVA_Factory#203); the
        checkpoints it published were trained that way.

        Raises: ModelError M545 if the encoder has prefix tokens, of which TinyLLaVA dropped the right one.
        """
        if self.prefix_tokens:
            given = f"vision.compat={TINYLLAVA_SIGLIP} is for encoders without a CLS token; this one has"
            raise ModelError("M545", f"{given} {self.prefix_tokens} prefix tokens.", "leave vision.compat out.")
        self.dropped_patches = 1

    @property
    def num_tokens(self) -> int:
        """n: tokens of one image."""
        return self.grid[0] * self.grid[1] - self.dropped_patches


def layer_index(layer: int, count: int, *, first: int = 0) -> int:
    """The layer that `vision.layer` means, counted from 0.

    Args: first: 0 where layer 0 is the first block; 1 where it is what goes into the first block, so that the layers
        from 1 on are blocks 0, 1, ... (`hidden_states` of transformers).
    Raises: ModelError M545 if there is none.
    """
    if not -count <= layer < count + first or (first and layer == 0):
        reach = f"vision.layer={layer}: the model has {count} layers."
        raise ModelError("M545", reach, f"use -{count} to -1, as LLaVA's -2.")
    return layer + count if layer < 0 else layer - first


def unknown_model(library: str, name: str, known: Iterable[str]) -> ModelError:
    """M543 with the few names that are most alike: the libraries know a thousand."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=8, cutoff=0.5) or names[:8]
    return ModelError("M543", f"{library} has no model '{name}'{nearest(name, close)}")


def triple(values: Any) -> Triple | None:
    """Three numbers of a model's configuration, None if it gives none."""
    if values is None:
        return None
    red, green, blue = (float(v) for v in values)
    return red, green, blue
