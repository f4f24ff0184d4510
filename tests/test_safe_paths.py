"""Names of images that are not there: one line says why, or what the record may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmpeft.errors import DataError
from vlmpeft.safe_paths import ImageFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("cat.jpg", "Dog.PNG", "coco/train2017/000000000009.jpg", "coco/val2017/000000000139.jpg", "été.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


MISSING = {
    "cat.jpeg": "did you mean 'cat.jpg'?",
    "CAT.jpg": "did you mean 'cat.jpg'?",
    "dog.png": "did you mean 'Dog.PNG'?",
    "COCO/train2017/000000000009.jpg": "did you mean 'coco/train2017/000000000009.jpg'?",
    "coco/train2017/000000000009.JPG": "did you mean 'coco/train2017/000000000009.jpg'?",
    "coco/train2071/000000000009.jpg": "did you mean 'coco/train2017/000000000009.jpg'?",
    "photos/cat.jpg": "did you mean 'cat.jpg'?",
    "cat.jpg/cat.jpg": "did you mean 'cat.jpg'?",
    "zzz.webp": "(4 files there)",
    "coco": ": it is a folder",
    "coco/train2017": ": it is a folder",
    ".": "(4 files there)",
    "x" * 300: ": a name of 300 characters is too long for a file",
    "coco/" + "x" * 5000: ": a name of 5,000 characters is too long for a file",
    "cat\0.jpg": "did you mean 'cat.jpg'?",
    "": "(4 files there)",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_image_is_told_with_a_reason_or_the_nearest_name(name: str, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        ImageFolder(folder).find(name)
    assert caught.value.code == "D103"
    assert MISSING[name] in caught.value.message
    assert caught.value.line().isprintable()
    assert len(caught.value.line()) < 600


@pytest.mark.parametrize("name", ["./cat.jpg", "coco/../cat.jpg", "coco/train2017/000000000009.jpg", "été.jpg"])
def test_a_name_that_is_there_is_found(name: str, folder: Path) -> None:
    assert ImageFolder(folder).find(name).samefile(folder / name)
