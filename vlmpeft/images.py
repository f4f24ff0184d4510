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
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlmpeft.anyres import TILES, Grid, Merge, Size, Tiling, best_grid
from vlmpeft.errors import DataError
from vlmpeft.squares import crop_to, pad_to_square, split

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no EPS or PDF: those would start an interpreter
MAX_PIXELS = 50_000_000
PILLOW_LIMIT = 178_956_970  # Pillow's decoders refuse more: twice PIL.Image.MAX_IMAGE_PIXELS
MAX_ASPECT = 200
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


def upright_size(path: Path, max_pixels: int = MAX_PIXELS) -> Size:
    """Width and height of what `open_image` gives. From the header, but for PNG, which may say at its end how it lies.

    Raises: as `open_image`.
    """
    with _opened(path, max_pixels) as image, _whole_files():
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        width, height = image.size
        return (height, width) if turned and image.format != "TIFF" else (width, height)  # Pillow turns TIFF by itself


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
    replace = "replace the file; training can leave it out with data.on_bad_sample=skip."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are refused by size below; corrupt metadata does no harm
            if path.stat().st_size == 0:
                raise DataError("D104", f'image "{path}" is 0 bytes.', replace)
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
        merge: how the tokens of the views follow one another; the size of an image decides them under "spatial_unpad".
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: Mode = "pad"
    tiles: tuple[Grid, ...] = TILES
    max_pixels: int = MAX_PIXELS
    merge: Merge = "flat"

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour in 8 bits, truncated as LLaVA does."""
        r, g, b = (int(255 * m) for m in self.mean)
        return r, g, b

    def num_views(self, size: Size) -> int:
        """v of an image of this width and height."""
        return self.tiling(size).views

    def tiling(self, size: Size) -> Tiling:
        """How an image of this width and height is shown."""
        if self.mode != "anyres":
            return Tiling()
        rows, columns = best_grid(size, self.size, self.tiles)
        views = 1 + rows * columns
        return Tiling(views) if self.merge == "flat" else Tiling(views, (rows, columns), size)

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

    A file whose tiling was asked and which has another when it is read is refused: its tokens are in the batch.
    """

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform
        self._known: dict[Path, Tiling] = {}

    def num_views(self, image: Path | Image.Image) -> int:
        """v of an image. Raises: as `open_image`."""
        return self.tiling(image).views

    def tiling(self, image: Path | Image.Image) -> Tiling:
        """How an image is shown. Raises: as `open_image`."""
        if self.transform.mode != "anyres":
            return Tiling()
        if isinstance(image, Image.Image):
            return self.transform.tiling(self.picture(image).size)
        if image not in self._known:
            self._known[image] = self._from_file(image)
        return self._known[image]

    def _from_file(self, path: Path) -> Tiling:
        """From the header alone, unless it matters whether the image lies on its side."""
        width, height = check_header(path, self.transform.max_pixels).size
        tiling = self.transform.tiling((width, height))
        if tiling == self.transform.tiling((height, width)):
            return tiling
        return self.transform.tiling(upright_size(path, self.transform.max_pixels))

    def picture(self, image: Path | Image.Image) -> Image.Image:
        """An image as upright RGB."""
        if isinstance(image, Image.Image):
            return upright_rgb(image, Path("image"))
        return open_image(Path(image), self.transform.max_pixels)

    def __call__(self, image: Path | Image.Image) -> Tensor:
        """Returns: (v, 3, size, size). Raises: as `open_image`; DataError D104 for a file that has changed."""
        picture = self.picture(image)
        now = self.transform.tiling(picture.size)
        then = now if isinstance(image, Image.Image) else self._known.get(image, now)
        if now != then:
            changed = (
                f"{then.views} views, now {now.views}" if then.views != now.views else f"{then.size}, now {now.size}"
            )
            message = f'image "{image}" has another shape than when it was checked: {changed}.'
            raise DataError("D104", message, "leave the images alone while they are used, and start again.")
        return self.transform(picture)
