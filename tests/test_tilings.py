"""How tilings travel: read from headers, kept with encodings and with samples on disk, held against the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llava import TOKENS
from PIL import Image

from vlmpeft.anyres import Size, Tiling, merged_tokens, tiling_of
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.data import truncated
from vlmpeft.errors import DataError
from vlmpeft.images import ImageReader, ImageTransform
from vlmpeft.sample_store import Sample, SampleStore, SampleWriter, packed
from vlmpeft.template import IMAGE, Exchange, TurnEncoder

SIDE, VIEW = 32, (4, 4)  # 16 tokens of a view
HALF = (0.5, 0.5, 0.5)
SIZES = {"wide": (200, 41), "tall": (33, 190)}
TRANSFORM = ImageTransform(SIDE, HALF, HALF, "anyres", merge="spatial_unpad")


def noise(size: Size, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photo_on_its_side_is_tiled_as_it_is_shown(suffix: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"a.{suffix}"
    noise((70, 41)).save(path, exif=exif)
    read = ImageReader(TRANSFORM)
    tiling = read.tiling(path)
    assert tiling.size == read.picture(path).size == ((41, 70) if orientation > 4 else (70, 41))
    assert len(read(path)) == tiling.views


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif", "bmp", "gif"])
def test_tilings_come_from_headers_alone(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise((70, 41)).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr("vlmpeft.images.open_image", lambda *_: pytest.fail("decoded"))
    assert ImageReader(TRANSFORM).tiling(tmp_path / f"a.{suffix}") == TRANSFORM.tiling((70, 41))


def test_a_file_of_another_size_is_refused_though_its_views_are_as_many(tmp_path: Path) -> None:
    read, path = ImageReader(TRANSFORM), tmp_path / "a.png"
    noise((120, 110)).save(path)
    assert read.tiling(path) == Tiling(5, (2, 2), (120, 110))
    noise((110, 110)).save(path)
    with pytest.raises(DataError, match=r"D104.*\(120, 110\), now \(110, 110\)"):
        read(path)


@pytest.mark.parametrize("independent", [False, True])
def test_an_encoding_has_room_for_every_image_and_keeps_its_tiling(independent: bool, tokenizer: Any) -> None:
    encoder = TurnEncoder(tokenizer, "chatml", TOKENS, view_grid=VIEW)
    tilings = [TRANSFORM.tiling(size) for size in (SIZES["wide"], SIZES["tall"])]
    exchanges = [Exchange((IMAGE, "and", IMAGE, "?"), "Yes"), Exchange(("What?",), "No")]
    found = encoder.encode(exchanges, independent, tilings)
    runs = "".join("i" if i == IMAGE_TOKEN_ID else "t" for i in found.input_ids).split("t")
    assert [len(run) for run in runs if run] == [merged_tokens(t, VIEW) for t in tilings]
    assert found.tilings == tilings
    flat = TurnEncoder(tokenizer, "chatml", TOKENS).encode(exchanges, independent, tilings)
    assert flat.tilings == []
    files, tokens = [Path("a"), Path("b")], [encoder.tokens_of(t) for t in tilings]
    short, images = truncated(found, files, len(found.input_ids) - 1, tokens, "right")
    assert (short.tilings, images) == (tilings, tuple(files))
    late = encoder.encode([Exchange((IMAGE, "?"), "Yes"), Exchange((IMAGE, "?"), "No")], False, tilings)
    cut, images = truncated(late, files, tokens[0] + 40, tokens, "right")
    assert (cut.tilings, images) == (tilings[:1], (files[0],))


def test_samples_keep_their_tilings_on_disk(tmp_path: Path) -> None:
    tilings = [TRANSFORM.tiling(SIZES["wide"]), Tiling(), TRANSFORM.tiling(SIZES["tall"])]
    assert [tiling_of(t.numbers()) for t in tilings] == tilings
    samples = [
        Sample(str(n), [1, IMAGE_TOKEN_ID, 3], [IGNORE, IGNORE, 3], [0, 0, 0], tuple(map(Path, files)), tuple(shown))
        for n, (files, shown) in enumerate([("ab", tilings[:2]), ("c", tilings[2:]), ("", []), ("ca", tilings[2::-2])])
    ]
    writer = SampleWriter(tmp_path)
    for sample in samples:
        writer.add(packed(sample))
    writer.close((), (), {})
    store = SampleStore(tmp_path)
    assert [(s.images, s.tilings) for s in store] == [(s.images, s.tilings) for s in samples]
