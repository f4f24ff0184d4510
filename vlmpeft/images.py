"""Images: one documented path from a file to pixels, in training and evaluation alike.

Open (formats allowlisted, size checked from the header before decoding) -> orient by EXIF -> convert to RGB -> pad or
crop -> resize -> normalise.
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
from PIL import Image, ImageOps
from torch import Tensor

from vlmpeft.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no EPS or PDF: those would start an interpreter
MAX_PIXELS = 50_000_000
MAX_ASPECT = 200
Mode = Literal["pad", "square"]


def open_image(path: Path) -> Image.Image:
    """Decode an image file to upright RGB.

    Transparent pixels lie over white, 16-bit grey is divided by 257, an animation gives its first frame.

    Raises:
        DataError: D104 unreadable, truncated or not an allowed format, D105 too many pixels, D106 too narrow.
    """
    with _opened(path) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), path)


def check_header(path: Path) -> None:
    """Check format and size from the header alone. Raises: as `open_image`."""
    with _opened(path):
        pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
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
                check_size(image.size, path)
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError("D105", f'image "{path}": {error}', "scale it down before training.") from error
    except Exception as error:  # Pillow's decoders raise many kinds (struct.error, SyntaxError, EOFError, ...)
        reason = f'image "{path}" cannot be read: {str(error) or type(error).__name__}.'
        raise DataError("D104", reason, replace) from error


def check_size(size: tuple[int, int], path: Path) -> None:
    """Refuse images that would exhaust memory or that no crop can show. Raises: DataError D105, D106."""
    width, height = size
    if width * height > MAX_PIXELS:
        message = f'image "{path}" has {width}x{height} pixels, more than {MAX_PIXELS:,}.'
        raise DataError("D105", message, "scale it down before training.")
    if max(size) > MAX_ASPECT * max(1, min(size)):
        message = f'image "{path}" is {width}x{height}: one side is more than {MAX_ASPECT} times the other.'
        raise DataError("D106", message, "crop it.")


def to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Any allowed mode to RGB. Raises: DataError D104 for float pixels, whose range nobody declares."""
    if image.mode == "F":
        raise DataError("D104", f'image "{path}" holds floating-point pixels.', "convert it to 8-bit RGB.")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """PIL image to a normalised tensor.

    Args:
        size: side in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel.
        mode: "pad" pastes the image on a square of the mean colour, "square" crops the centre after the shortest edge
            is brought to `size` (LLaVA `image_aspect_ratio` pad and square).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: Mode = "pad"

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour in 8 bits, truncated as LLaVA does."""
        r, g, b = (int(255 * m) for m in self.mean)
        return r, g, b

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns: (3, size, size) float32."""
        square = pad_to_square(image, self.fill) if self.mode == "pad" else image
        pixels = np.array(crop_to(square, self.size), dtype=np.float32) / 255.0
        normalised = (torch.from_numpy(pixels) - torch.tensor(self.mean)) / torch.tensor(self.std)
        return normalised.permute(2, 0, 1).contiguous()


def pad_to_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """Centre the image on a square of its longer side; the odd pixel goes right or below, as in LLaVA."""
    side = max(image.size)
    if image.size == (side, side):
        return image
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
