"""Images: one documented path from a file to pixels, in training and evaluation alike.

Open (formats allowlisted, size checked from the header before decoding) -> orient by EXIF -> convert to RGB -> pad,
crop or tile -> resize -> normalise.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlmpeft.anyres import TILES, Grid, Size, best_grid, boxes, placement
from vlmpeft.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no EPS or PDF: those would start an interpreter
MAX_PIXELS = 50_000_000
PILLOW_LIMIT = 178_956_970  # Pillow's decoders refuse more: twice PIL.Image.MAX_IMAGE_PIXELS
MAX_ASPECT = 200
MAX_CANVAS = 8192  # side of a square an image is padded to: 200 MB; that of a long 50-megapixel strip would take 30 GB
Mode = Literal["pad", "square", "anyres"]


@dataclass(frozen=True)
class Header:
    """What a file says of its image. size: as stored. animated: whether frames or pages follow the first."""

    size: Size
    animated: bool


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to upright RGB.

    Transparent pixels lie over white, 16-bit grey is divided by 257, an animation gives its first frame.

    Raises:
        DataError: D104 unreadable, truncated or not an allowed format, D105 too many pixels, D106 too narrow.
    """
    with _opened(path, max_pixels) as image, _whole_files():
        image.load()
        return upright_rgb(image, path)


def check_header(path: Path, max_pixels: int = MAX_PIXELS) -> Header:
    """Check format, size and kind of pixels from the header alone. Raises: as `open_image`."""
    with _opened(path, max_pixels) as image:
        return Header(image.size, bool(getattr(image, "is_animated", False)))  # BMP has no such attribute


@contextlib.contextmanager
def _whole_files() -> Iterator[None]:
    """Let Pillow refuse files that break off, though another library (lmms-eval does) had it fill them with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """An image file whose header is good; what Pillow says of it inside the block becomes D104 or D105."""
    replace = "replace the file or set data.on_bad_sample=skip."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are refused by size below; corrupt metadata does no harm
            if path.stat().st_size == 0:
                raise DataError(
                    "D104", f'image "{path}" is 0 bytes.', "download it again or set data.on_bad_sample=skip."
                )
            with Image.open(path, formats=FORMATS) as image:
                check_size(image.size, path, max_pixels)
                refuse_float(image, path)
                yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        reason = f'image "{path}" is no readable {", ".join(FORMATS[:-1])} or {FORMATS[-1]} file.'
        raise DataError("D104", reason, replace) from error
    except Image.DecompressionBombError as error:
        raise DataError("D105", f'image "{path}": {error}', "scale it down before training.") from error
    except Exception as error:  # Pillow's decoders raise many kinds (struct.error, SyntaxError, EOFError, ...)
        reason = f'image "{path}" cannot be read: {str(error) or type(error).__name__}.'
        raise DataError("D104", reason, replace) from error


def check_size(size: Size, path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse images that would exhaust memory or that no crop can show. Raises: DataError D105, D106."""
    width, height = size
    if width * height > max_pixels:
        message = f'image "{path}" has {width}x{height} pixels, more than {max_pixels:,}.'
        raise DataError("D105", message, "scale it down, or raise data.max_image_pixels.")
    if max(size) > MAX_ASPECT * max(1, min(size)):
        message = f'image "{path}" is {width}x{height}: one side is more than {MAX_ASPECT} times the other.'
        raise DataError("D106", message, "crop it.")


def refuse_float(image: Image.Image, path: Path) -> None:
    """Nobody declares the range of float pixels. Raises: DataError D104."""
    if image.mode == "F":
        raise DataError("D104", f'image "{path}" holds floating-point pixels.', "convert it to 8-bit RGB.")


def upright_rgb(image: Image.Image, path: Path) -> Image.Image:
    """A decoded image as its camera saw it, any mode as RGB. Raises: as `refuse_float`."""
    refuse_float(image, path)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """PIL image to its views: the squares that the encoder sees, normalised. Letter: v views.

    Args:
        size: side of a view in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel.
        mode: "pad" pastes the image on a square of the mean colour, "square" crops the centre after the shortest edge
            is brought to `size` (LLaVA `image_aspect_ratio` pad and square); both give one view. "anyres" gives the
            whole image squeezed into a square, then the tiles of the grid that fits it best, row by row (LLaVA-NeXT).
        tiles: grids "anyres" chooses from, as rows and columns.
        max_pixels: of a file that is opened.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: Mode = "pad"
    tiles: tuple[Grid, ...] = TILES
    max_pixels: int = MAX_PIXELS

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour in 8 bits, truncated as LLaVA does."""
        r, g, b = (int(255 * m) for m in self.mean)
        return r, g, b

    def num_views(self, size: Size) -> int:
        """v of an image of this width and height."""
        if self.mode != "anyres":
            return 1
        rows, columns = best_grid(size, self.size, self.tiles)
        return 1 + rows * columns

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns: (v, 3, size, size) float32."""
        return torch.stack([self._normalised(square) for square in self._squares(image)])

    def _squares(self, image: Image.Image) -> list[Image.Image]:
        if self.mode == "anyres":
            tiles = split(image, best_grid(image.size, self.size, self.tiles), self.size)
            return [image.resize((self.size, self.size), Image.Resampling.BICUBIC), *tiles]
        return [crop_to(pad_to_square(image, self.fill) if self.mode == "pad" else image, self.size)]

    def _normalised(self, square: Image.Image) -> Tensor:
        """(3, size, size)."""
        pixels = np.array(square, dtype=np.float32) / 255.0
        normalised = (torch.from_numpy(pixels) - torch.tensor(self.mean)) / torch.tensor(self.std)
        return normalised.permute(2, 0, 1).contiguous()


class ImageReader:
    """Files and pictures to their views, which can be counted before anything is decoded.

    A file whose views were counted and which has others when it is read is refused: its tokens are in the batch.
    """

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform
        self._counted: dict[Path, int] = {}

    def num_views(self, image: Path | Image.Image) -> int:
        """v of an image. Raises: as `open_image`."""
        if self.transform.mode != "anyres":
            return 1
        if isinstance(image, Image.Image):
            return self.transform.num_views(self.picture(image).size)
        if image not in self._counted:
            self._counted[image] = self._count(image)
        return self._counted[image]

    def _count(self, path: Path) -> int:
        """From the header, unless it matters whether the image lies on its side, which few files say there."""
        width, height = check_header(path, self.transform.max_pixels).size
        count = self.transform.num_views((width, height))
        if count == self.transform.num_views((height, width)):
            return count
        return self.transform.num_views(self.picture(path).size)

    def picture(self, image: Path | Image.Image) -> Image.Image:
        """An image as upright RGB."""
        if isinstance(image, Image.Image):
            return upright_rgb(image, Path("image"))
        return open_image(Path(image), self.transform.max_pixels)

    def __call__(self, image: Path | Image.Image) -> Tensor:
        """Returns: (v, 3, size, size). Raises: as `open_image`; DataError D104 for a file that has changed."""
        views = self.transform(self.picture(image))
        counted = len(views) if isinstance(image, Image.Image) else self._counted.get(image, len(views))
        if len(views) != counted:
            changed = f'image "{image}" has another shape than when it was checked: {counted} views, now {len(views)}.'
            raise DataError("D104", changed, "leave the images alone while they are used, and start again.")
        return views


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
