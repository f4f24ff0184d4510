"""LLaVA-NeXT's spatial_unpad: an image's tiles become one picture, its padding goes, a newline closes every row.

Letters: v views, n tokens of a view, r c rows and columns of tiles, h w of a view's tokens, t tokens of all images,
d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from vlmpeft.anyres import Grid, Tiling, unpadded
from vlmpeft.errors import ModelError


def merged(views: Tensor, tilings: Sequence[Tiling] | None, view: Grid, newline: Tensor) -> Tensor:
    """The tokens of images in their order. Nothing is read back from the device.

    Args: views: (v, n, d), of all images. view: h, w. newline: (d,).
    Returns: (t, d).
    Raises: ModelError M515 if the tilings are not those of the views.
    Source: `pack_image_features` of transformers' modeling_llava_next.py; LLaVA llava_arch.py.
    """
    counts = [tiling.views for tiling in tilings or ()]
    if sum(counts) != len(views):
        raise ModelError(
            "M515",
            f"tilings of {sum(counts)} views, but pixel_values holds {len(views)}.",
            "give the model `Batch.inputs()`: with data.tile_merge=spatial_unpad an image's size decides its tokens.",
        )
    newline = newline.to(views.dtype)
    images = zip(views.split(counts), tilings or (), strict=True)
    return torch.cat([_one(image, tiling, view, newline) for image, tiling in images])


def _one(views: Tensor, tiling: Tiling, view: Grid, newline: Tensor) -> Tensor:
    """(1 + r * c, n, d), the whole image and its tiles -> (`merged_tokens`, d)."""
    if tiling.grid is None or tiling.size is None:
        return torch.cat([views[0], newline[None]])
    joined = rearrange(views[1:], "(r c) (h w) d -> (r h) (c w) d", r=tiling.grid[0], h=view[0])
    kept = joined[unpadded(tiling.grid, tiling.size, view)]
    closed = torch.cat([kept, newline.expand(len(kept), 1, -1)], 1)
    return torch.cat([views[0], rearrange(closed, "h w d -> (h w) d")])
