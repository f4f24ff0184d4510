"""Squares cut from a picture, as LLaVA and LLaVA-NeXT cut them: padded, cropped or tiled."""

from __future__ import annotations

from PIL import Image, ImageOps

from vlmpeft.anyres import Grid, boxes, placement

MAX_CANVAS = 8192  # side of a square an image is padded to: 200 MB; that of a long 50-megapixel strip would take 30 GB


def split(image: Image.Image, grid: Grid, side: int) -> list[Image.Image]:
    """An image resized (bicubic) onto a black canvas and cut into the tiles of `grid`, row by row, as in LLaVA-NeXT."""
    rows, columns = grid
    size, corner = placement(image.size, grid, side)
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    return [canvas.crop(box) for box in boxes(grid, side)]


def pad_to_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """Centre the image on a square of its longer side; the odd pixel goes right or below, as in LLaVA."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    if side > MAX_CANVAS:
        return pad_to_square(ImageOps.contain(image, (MAX_CANVAS, MAX_CANVAS)), fill)
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def crop_to(image: Image.Image, size: int) -> Image.Image:
    """Shortest edge to `size` (bicubic), then the centre square, as CLIPImageProcessor does."""
    short = min(image.size)
    width, height = (int(size * s / short) for s in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC) if image.size != (width, height) else image
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))
