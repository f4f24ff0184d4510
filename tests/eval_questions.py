"""Questions and pictures that the tests of the benchmarks' shared parts ask about."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

QUESTIONS = [
    {"question_id": 5, "image": "a.png", "text": "Is there a cat?", "label": "yes"},
    {"question_id": 6, "image": "b.png", "text": "Is there a dog?", "label": "no"},
    {"question_id": 7, "image": "sub/c.png", "text": "Is there a cow?", "label": "no"},
    {"question_id": 8, "image": "a.png", "text": "Is there a hat?", "label": "yes"},
]


def write_pictures(folder: Path) -> Path:
    """Three flat pictures of two sizes, one of them in a folder below."""
    (folder / "sub").mkdir(parents=True)
    for name, size in {"a.png": (4, 3), "b.png": (4, 3), "sub/c.png": (2, 5)}.items():
        Image.new("RGB", size, "red").save(folder / name)
    return folder
