"""From a file to pixels: formats, orientation, conversion, refusals, and parity with CLIP's own preprocessing."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmpeft import images, squares
from vlmpeft.errors import DataError
from vlmpeft.images import ImageTransform, check_header, open_image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
WHITE, RED = (255, 255, 255), (200, 30, 40)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds 10 bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


def refused(check: Callable[[Path], Any], path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError) as caught:
            check(path)
    assert str(path) in caught.value.message
    return caught.value.code


FLIP = Image.Transpose
TURNS: dict[int, tuple[Image.Transpose, ...]] = {  # what a camera did to the upright picture (EXIF 2.3, tag 0x112)
    **{1: (), 2: (FLIP.FLIP_LEFT_RIGHT,), 3: (FLIP.ROTATE_180,), 4: (FLIP.FLIP_TOP_BOTTOM,)},
    **{5: (FLIP.TRANSPOSE,), 6: (FLIP.ROTATE_90,), 7: (FLIP.TRANSVERSE,), 8: (FLIP.ROTATE_270,)},
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_rotated_photo_is_shown_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = noise(7, 4)
    stored = upright
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x112] = orientation
    path = saved(stored, tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(upright))


def test_nonsense_in_exif_does_no_harm(tmp_path: Path) -> None:
    for seed in range(20):
        exif = b"Exif\0\0" + b"II*\0\x08\0\0\0" + np.random.default_rng(seed).bytes(40)
        path = saved(Image.new("RGB", (6, 4)), tmp_path / "a.jpg", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert open_image(path).size in ((6, 4), (4, 6))


def test_transparent_pixels_lie_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (2, 1), (*RED, 0))
    rgba.putpixel((1, 0), (*RED, 255))
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([*RED, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    grey = Image.new("LA", (2, 1), (10, 0))
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), (1, 2, 3))
    for image, options, expected in (
        (rgba, {}, [WHITE, RED]),
        (half, {}, [(127, 127, 127)] * 2),
        (palette, {"transparency": 0}, [WHITE, (0, 0, 255)]),
        (palette, {}, [RED, (0, 0, 255)]),
        (grey, {}, [WHITE] * 2),
        (keyed, {"transparency": RED}, [WHITE, (1, 2, 3)]),
    ):
        shown = open_image(saved(image, tmp_path / "a.png", **options))
        assert (shown.mode, [shown.getpixel((x, 0)) for x in range(2)]) == ("RGB", expected)


def test_every_depth_becomes_eight_bit_rgb(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    for name in ("a.png", "a.tif"):
        shown = np.asarray(open_image(saved(deep, tmp_path / name)))
        assert shown.tolist() == [[[v] * 3 for v in (0, 1, 127, 255)]]
    bits = Image.new("1", (2, 1), 1)
    bits.putpixel((0, 0), 0)
    assert np.asarray(open_image(saved(bits, tmp_path / "b.png"))).tolist() == [[[0] * 3, [255] * 3]]
    for mode, colour, expected in (("CMYK", (255, 0, 0, 0), (0, 255, 255)), ("L", 77, (77, 77, 77))):
        shown = open_image(saved(Image.new(mode, (4, 4), colour), tmp_path / "c.tif"))
        assert (shown.mode, shown.getpixel((0, 0))) == ("RGB", expected)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animation_gives_its_first_frame(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 5), c) for c in (RED, (0, 0, 255))]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    assert open_image(path).getpixel((2, 2)) == RED


def test_float_pixels_are_refused_for_their_range_is_unknown(tmp_path: Path) -> None:
    assert refused(open_image, saved(Image.new("F", (4, 4)), tmp_path / "a.tif")) == "D104"


@pytest.mark.parametrize("check", [check_header, open_image])
def test_what_is_no_image_is_refused(check: Callable[[Path], Any], tmp_path: Path) -> None:
    for name, data in {
        "empty.jpg": b"",
        "page.jpg": b"<html><body>404</body></html>",
        "cut.png": png_header(4, 4)[:20],
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n",
        "paper.pdf": b"%PDF-1.4",
    }.items():
        (tmp_path / name).write_bytes(data)
        assert refused(check, tmp_path / name) == "D104"


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
def test_truncated_image_is_refused_when_decoded(suffix: str, tmp_path: Path) -> None:
    path = saved(noise(64, 64), tmp_path / f"a.{suffix}")
    open_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refused(open_image, path) == "D104"


def test_wrong_extension_of_a_good_image_is_accepted(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (4, 4), RED), tmp_path / "a.jpg", format="PNG")
    check_header(path)
    assert open_image(path).getpixel((0, 0)) == RED


@pytest.mark.parametrize("check", [check_header, open_image])
@pytest.mark.parametrize("side", [7_100, 9_500, 14_000, 30_000])
def test_bomb_is_refused_from_its_header(
    check: Callable[[Path], Any], side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert refused(check, tmp_path / "bomb.png") == "D105"


@pytest.mark.parametrize("check", [check_header, open_image])
def test_only_absurdly_narrow_images_are_refused(check: Callable[[Path], Any], tmp_path: Path) -> None:
    for size in ((1, 10_000), (10_000, 1), (201, 1)):
        assert refused(check, saved(Image.new("RGB", size), tmp_path / "a.png")) == "D106"
    for size in ((1, 1), (200, 1), (1, 200)):
        check(saved(Image.new("RGB", size), tmp_path / "a.png"))


SIZES = [(640, 480), (333, 500), (33, 71), (15, 9), (64, 64), (1, 1), (1, 3), (500, 101), (65, 64), (97, 61)]


def clip_pixels(image: Image.Image, size: int, pad: bool) -> torch.Tensor:
    """LLaVA's way: `expand2square` (padding by NumPy here), then CLIPImageProcessor."""
    from transformers import CLIPImageProcessorPil

    if pad:
        side, array = max(image.size), np.asarray(image)
        canvas = np.empty((side, side, 3), dtype=np.uint8)
        canvas[:] = [int(255 * m) for m in MEAN]
        top, left = (side - image.height) // 2, (side - image.width) // 2
        canvas[top : top + image.height, left : left + image.width] = array
        image = Image.fromarray(canvas)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size, image_mean=MEAN, image_std=STD)
    pixels: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return pixels


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("size", [64, 37])
def test_pixels_equal_clips_own_processor(mode: Any, size: int) -> None:
    """The resize is the same PIL call: 8-bit values agree exactly; 1e-5 allows for the order of float operations."""
    transform = ImageTransform(size, MEAN, STD, mode)
    for width, height in SIZES:
        image = noise(width, height, seed=width)
        [pixels] = transform(image)
        assert (pixels.shape, pixels.dtype) == ((3, size, size), torch.float32)
        torch.testing.assert_close(pixels, clip_pixels(image, size, mode == "pad"), atol=1e-5, rtol=0)


def test_borders_are_padded_with_the_mean_or_cropped_away() -> None:
    assert ImageTransform(8, MEAN, STD).fill == (122, 116, 104)  # LLaVA's colour for CLIP
    assert ImageTransform(8, (0.5,) * 3, STD).fill == (127, 127, 127)
    wide = Image.new("RGB", (30, 10), RED)
    [padded] = ImageTransform(30, MEAN, STD, "pad")(wide)
    assert padded[:, :10].abs().max() < 0.02  # the mean normalises to 0, up to the rounding of the fill
    assert padded[:, 20:].abs().max() < 0.02
    red = (torch.tensor(RED) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(padded[:, 10:20], red[:, None, None].expand(3, 10, 30), atol=1e-6)
    assert torch.allclose(
        ImageTransform(10, MEAN, STD, "square")(wide), red[:, None, None].expand(3, 10, 10), atol=1e-6
    )


def test_a_long_strip_is_made_smaller_before_it_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    strip = Image.fromarray(np.tile(np.arange(0, 250, 2, dtype=np.uint8)[None, :, None], (20, 1, 3))).resize((1000, 20))
    whole = ImageTransform(32, MEAN, STD)(strip)
    sides: list[tuple[int, int]] = []
    new = Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *more: sides.append(size) or new(mode, size, *more))
    monkeypatch.setattr(squares, "MAX_CANVAS", 256)
    assert (ImageTransform(32, MEAN, STD)(strip) - whole).abs().mean() < 0.02
    assert (256, 256) in sides
    assert (1000, 1000) not in sides


def test_limit_of_pixels_is_the_documented_one() -> None:
    images.check_size((10_000, 5_000), Path("a"))
    with pytest.raises(DataError, match="D105"):
        images.check_size((10_000, 5_001), Path("a"))
