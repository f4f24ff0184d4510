"""Files as people have them: every kind of pixel has one conversion, and what is no whole image is refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_records import record, write_folder
from PIL import Image, ImageFile
from runs import run_train
from test_images import FLIP, RED, TURNS, WHITE, noise, png_header, refused, saved

from vlmpeft.data import Samples, load_batches
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.errors import DataError
from vlmpeft.images import FORMATS, ImageReader, ImageTransform, check_header, open_image
from vlmpeft.prepare import Prepared, prepare
from vlmpeft.record_encoder import Preparation
from vlmpeft.template import TurnEncoder

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
GREY = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # every value that 8 bits hold exactly
ODD = GREY // 257 * 256
BLUE = (0, 0, 255)


def flat(colour: tuple[int, ...], size: tuple[int, int] = (16, 16)) -> np.ndarray[Any, Any]:
    return np.full((size[1], size[0], 3), colour, dtype=np.uint8)


def halves(left: tuple[int, ...], right: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.concatenate([flat(left, (8, 16)), flat(right, (8, 16))], axis=1)


def half_clear(mode: str, colour: Any) -> Image.Image:
    """A picture whose left half is fully transparent."""
    image = Image.new(mode, (16, 16), colour)
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 8, 16))
    image.putalpha(mask)
    return image


def with_palette() -> Image.Image:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([*RED, *BLUE])
    image.paste(0, (0, 0, 8, 16))
    return image


def film(suffix: str, folder: Path, **options: Any) -> Path:
    frames = [Image.new("RGB", (16, 16), c) for c in (RED, BLUE, WHITE)]
    path = folder / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    return path


def prepared(file: Path, config: DataConfig, tokenizer: Any) -> Prepared:
    return prepare([DataFile(str(file))], Preparation(config, TurnEncoder(tokenizer, "chatml", 1)))


SPREAD = noise(16, 16, seed=4)
LUMA = np.asarray(SPREAD.convert("L"))
KINDS: dict[str, tuple[Callable[[Path], Path], np.ndarray[Any, Any]]] = {  # how it is written, and what it must show
    "rgb png": (lambda d: saved(SPREAD, d / "a.png"), np.asarray(SPREAD)),
    "cmyk tiff": (lambda d: saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), d / "a.tif"), flat((0, 255, 255))),
    "palette": (lambda d: saved(with_palette(), d / "a.png"), halves(RED, BLUE)),
    "palette, one colour clear": (lambda d: saved(with_palette(), d / "a.png", transparency=0), halves(WHITE, BLUE)),
    "palette, clear by half": (
        lambda d: saved(with_palette(), d / "a.png", transparency=bytes([0, 127])),
        halves(WHITE, (128, 128, 255)),
    ),
    "grey and alpha": (lambda d: saved(half_clear("L", 40), d / "a.png"), halves(WHITE, (40, 40, 40))),
    "rgb and alpha": (lambda d: saved(half_clear("RGB", RED), d / "a.png"), halves(WHITE, RED)),
    "one bit": (lambda d: saved(SPREAD.convert("1"), d / "a.png"), np.asarray(SPREAD.convert("1").convert("RGB"))),
    "8-bit grey": (lambda d: saved(SPREAD.convert("L"), d / "a.bmp"), np.stack([LUMA] * 3, 2)),
    "16-bit grey png": (lambda d: saved(Image.fromarray(GREY), d / "a.png"), np.stack([GREY // 257] * 3, 2)),
    "16-bit grey tiff": (lambda d: saved(Image.fromarray(ODD), d / "a.tif"), np.stack([ODD // 257] * 3, 2)),
    "animated gif": (lambda d: film("gif", d), flat(RED)),
    "animated png": (lambda d: film("png", d), flat(RED)),
    "animated webp": (lambda d: film("webp", d, lossless=True), flat(RED)),
    "pages of a tiff": (lambda d: film("tif", d), flat(RED)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel_is_shown_as_documented(kind: str, tmp_path: Path) -> None:
    write, expected = KINDS[kind]
    shown = open_image(write(tmp_path))
    assert shown.mode == "RGB"
    assert np.array_equal(np.asarray(shown), expected)


def test_cmyk_photo_is_close_to_its_colours(tmp_path: Path) -> None:
    path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95)
    assert np.abs(np.asarray(open_image(path)).astype(int) - flat((255, 0, 0))).max() <= 3


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_16_bit_colour_keeps_its_high_bytes(tmp_path: Path) -> None:
    """Pillow reads 16-bit colour PNGs as 8-bit; at exact multiples of 257 that is the division by 257."""
    values = np.stack([np.arange(256) * 257, np.arange(255, -1, -1) * 257, np.zeros(256)], 1).reshape(16, 16, 3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), values // 257)


@pytest.mark.parametrize("kind", KINDS)
def test_only_files_of_several_frames_count_as_animated(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind][0](tmp_path)
    assert check_header(path).animated == (kind.startswith("animated") or kind.startswith("pages"))
    assert check_header(path).size == (16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_bytes_that_the_main_process_reads(workers: int, tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "images"
    files = []
    for i, (write, _) in enumerate(KINDS.values()):
        (folder / str(i)).mkdir(parents=True)
        files.append(write(folder / str(i)))
    records = [{**record(image=str(path.relative_to(folder))), "id": i} for i, path in enumerate(files)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    found = prepared(tmp_path / "train.json", DataConfig(images=str(folder)), tokenizer)
    read = ImageReader(ImageTransform(16, MEAN, STD, "square"))
    steps = [list(range(start, len(files), 4)) for start in range(4)]
    for step, loaded in zip(steps, load_batches(Samples(found.samples, read), steps, workers), strict=True):
        pixels = np.stack([list(KINDS.values())[i][1] for i in step])
        expected = (torch.tensor(pixels, dtype=torch.float32) / 255 - 0.5) / 0.5
        assert loaded.batch.pixel_values is not None
        assert torch.equal(loaded.batch.pixel_values, expected.permute(0, 3, 1, 2))
    assert found.animated == 4


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("mode", ["pad", "square", "anyres"])
def test_a_rotated_photo_gives_the_views_of_the_upright_one(orientation: int, mode: Any, tmp_path: Path) -> None:
    upright = noise(50, 20)
    stored = upright
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x112] = orientation
    path = saved(stored, tmp_path / "a.png", exif=exif)
    read = ImageReader(ImageTransform(16, MEAN, STD, mode))
    expected = read.transform(upright)
    assert torch.equal(read(path), expected)  # as training and evaluation read files
    assert torch.equal(read(Image.open(path)), expected)  # as `generate` takes pictures


def test_orientation_behind_the_pixels_of_a_png_counts_too(tmp_path: Path) -> None:
    """PNG allows its EXIF chunk after the pixels: no header tells of it."""
    upright = noise(48, 16)
    stream = io.BytesIO()
    upright.transpose(FLIP.ROTATE_90).save(stream, "png")
    exif = Image.Exif()
    exif[0x112] = 6
    body, end = stream.getvalue()[:-12], stream.getvalue()[-12:]
    (tmp_path / "a.png").write_bytes(body + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + end)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(upright))
    lying = ImageReader(ImageTransform(16, MEAN, STD, "anyres", ((1, 3), (2, 2))))
    assert lying.num_views(tmp_path / "a.png") == len(lying(tmp_path / "a.png")) == 4


def test_a_phones_picture_of_pictures_is_a_jpeg(tmp_path: Path) -> None:
    first, second = noise(32, 32), Image.new("RGB", (8, 8))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert check_header(tmp_path / "a.jpg").animated
    assert open_image(tmp_path / "a.jpg").size == (32, 32)


@pytest.mark.parametrize("check", [check_header, open_image])
def test_what_is_refused_says_what_is_taken(check: Callable[[Path], Any], tmp_path: Path) -> None:
    for name, data in {"page.jpg": b"<html>404</html>", "a.svg": b"<svg/>", "b.pdf": b"%PDF-1.4"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as caught:
            check(tmp_path / name)
        assert all(kind in caught.value.message for kind in FORMATS)
    for kind in ("PPM", "ICO", "TGA", "JPEG2000"):  # Pillow could, we do not
        SPREAD.save(tmp_path / "a.img", format=kind)
        assert refused(check, tmp_path / "a.img") == "D104"


@pytest.mark.parametrize("check", [check_header, open_image])
def test_float_pixels_are_refused_from_the_header(check: Callable[[Path], Any], tmp_path: Path) -> None:
    assert refused(check, saved(Image.new("F", (4, 4)), tmp_path / "a.tif")) == "D104"


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("told", [False, True])
def test_an_image_that_breaks_off_is_refused_wherever_it_does(
    suffix: str, share: float, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another library has told Pillow to fill the rest with grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", told)
    path = saved(noise(64, 64), tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert refused(open_image, path) == "D104"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is told


def test_full_check_finds_before_training_what_headers_hide(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_folder(tmp_path)
    whole = saved(noise(64, 64), folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train.json").write_text(json.dumps([{**record(image="cut.jpg"), "id": "cut"}, record()]))
    config = DataConfig(images=str(folder))
    assert len(prepared(tmp_path / "train.json", config, tokenizer).samples) == 2
    with pytest.raises(DataError, match=r"D104.*cut\.jpg.*truncated"):
        prepared(tmp_path / "train.json", replace(config, verify_images="full"), tokenizer)


def test_the_limit_of_pixels_is_the_recipes(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_folder(tmp_path)
    saved(Image.new("RGB", (30, 20)), folder / "large.png")
    (tmp_path / "train.json").write_text(json.dumps([record(image="large.png")]))
    config = DataConfig(images=str(folder), max_image_pixels=600)
    assert len(prepared(tmp_path / "train.json", config, tokenizer).samples) == 1
    with pytest.raises(DataError, match=r"D105.*30x20 pixels, more than 599.*data\.max_image_pixels"):
        prepared(tmp_path / "train.json", replace(config, max_image_pixels=599), tokenizer)
    read = ImageReader(ImageTransform(16, MEAN, STD, max_pixels=599))
    with pytest.raises(DataError, match="D105"):
        read(folder / "large.png")
    (folder / "bomb.png").write_bytes(
        png_header(14_000, 14_000)
    )  # Pillow's own limit comes before a larger one of ours
    assert refused(lambda path: check_header(path, 10**9), folder / "bomb.png") == "D105"


def test_animated_images_are_counted_in_the_report(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    names = [film("gif", tmp_path / "images").name, saved(SPREAD, tmp_path / "images" / "a.png").name]
    records = [{**record(image=name), "id": i} for i, name in enumerate([*names, names[0]])]
    (tmp_path / "train.json").write_text(json.dumps(records))
    more = [f"data.instruct={tmp_path / 'train.json'}", f"data.images={tmp_path / 'images'}", "stages.pretrain=null"]
    more += ["stages.instruct.optim.steps=1", "run.save_every=0"]
    assert run_train(tiny_recipe, tmp_path / "run", *more) == 0
    assert "instruct: images of several frames or pages, of which the first is shown: 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"]["animated"] == 1
    assert "images of several frames, the first shown: 1" in (tmp_path / "run" / "report.html").read_text()
