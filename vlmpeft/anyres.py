"""Any-resolution tiling: which grid of squares shows an image best, and where the image lies on it.

LLaVA-1.5-HD and LLaVA-NeXT show an encoder of one size the whole picture and, beside it, the picture at a higher
resolution in tiles of that size. The arithmetic is that of LLaVA's `mm_utils.py` and of transformers'
`select_best_resolution` and `get_patch_output_size`, whose choices the tests compare. Sizes are (width, height),
grids (rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]
Grid = tuple[int, int]

TILES: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's image_grid_pinpoints, 336 px a side
MAX_TILES = 16  # rows or columns of a grid
Merge = Literal["flat", "spatial_unpad"]  # how the tokens of an image's views follow one another; LLaVA's names


@dataclass(frozen=True)
class Tiling:
    """How an image is shown.

    Args:
        views: squares that the encoder sees: the whole image, then its tiles row by row.
        grid: of the tiles; None without tiles, and where tokens do not depend on it.
        size: of the upright image, known where the grid is.
    """

    views: int = 1
    grid: Grid | None = None
    size: Size | None = None

    def numbers(self) -> list[int]:
        """All of it, for a file."""
        return [self.views, *(self.grid or ()), *(self.size or ())]


def tiling_of(numbers: Sequence[int]) -> Tiling:
    """What `Tiling.numbers` wrote."""
    views, *rest = numbers
    return Tiling(views, (rest[0], rest[1]), (rest[2], rest[3])) if rest else Tiling(views)


def unpadded(grid: Grid, size: Size, view: Grid) -> tuple[slice, slice]:
    """Rows and columns that an image keeps of its joined tiles, without those that hold padding alone.

    Args: view: rows and columns of the tokens of one tile.
    Source: `unpad_image` of transformers' modeling_llava_next.py, which counts as LLaVA does but for rounding.
    """
    (width, height), rows, columns = size, grid[0] * view[0], grid[1] * view[1]
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(cut, rows - cut), slice(0, columns)
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(cut, columns - cut)


def merged_tokens(tiling: Tiling, view: Grid) -> int:
    """Tokens of an image under spatial_unpad: the whole image, the kept rows of its tiles, a newline after each row.

    An image without tiles has one newline, at its end. Args: view: as `unpadded`.
    """
    whole = view[0] * view[1]
    if tiling.grid is None or tiling.size is None:
        return whole + 1
    rows, columns = unpadded(tiling.grid, tiling.size, view)
    return whole + (rows.stop - rows.start) * (columns.stop - columns.start + 1)


def best_grid(size: Size, side: int, tiles: Sequence[Grid]) -> Grid:
    """The grid of `side`-pixel squares that keeps most of an image's pixels; of equal ones the smaller, then the first.

    Args: tiles: at least one grid.
    """
    width, height = size

    def fit(grid: Grid) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * side / width, rows * side / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns * side**2  # what is kept, and minus what is wasted

    return max(tiles, key=fit)


def placement(size: Size, grid: Grid, side: int) -> tuple[Size, tuple[int, int]]:
    """Where an image lies on a grid: as large as fits, in the middle, the odd pixel of the border right or below.

    Returns: the size it is resized to, and its left and top edge.
    """
    (width, height), (rows, columns) = size, grid
    full_width, full_height = columns * side, rows * side
    by_width, by_height = full_width / width, full_height / height
    if by_width < by_height:
        fitted = full_width, min(math.ceil(height * by_width), full_height)
    else:
        fitted = min(math.ceil(width * by_height), full_width), full_height
    return fitted, ((full_width - fitted[0]) // 2, (full_height - fitted[1]) // 2)


def boxes(grid: Grid, side: int) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each tile, row by row."""
    rows, columns = grid
    for top in range(0, rows * side, side):
        for left in range(0, columns * side, side):
            yield left, top, left + side, top + side
