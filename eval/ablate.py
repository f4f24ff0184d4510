"""Does the model look at the picture? The same questions with the images blanked, exchanged or replaced by noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vlmpeft.errors import ConfigError, nearest

if TYPE_CHECKING:
    from PIL import Image

KINDS = ("none", "blank", "shuffle", "noise")
SEED = 0


class Blanks(Protocol):
    """What makes a blank picture: a loaded model."""

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        """A picture of the same size in the encoder's mean colour."""


def check_ablation(kind: str) -> None:
    """Raises: ConfigError C102 unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise ConfigError("C102", f"no ablation '{kind}'{nearest(kind, KINDS)}")


def ablated(bundle: Blanks, paths: Sequence[Path], kind: str) -> Sequence[Path | Image.Image]:
    """The picture to show in place of each image.

    Args:
        kind: `none` the image itself; `blank` its size in the encoder's mean colour; `shuffle` another of the images,
            the same one wherever it stood; `noise` its size in uniform random colours, seeded by the size.

    Raises:
        ConfigError: C102 for another kind, and for `shuffle` of a single image.
    """
    check_ablation(kind)
    if kind == "none":
        return paths
    if kind == "shuffle":
        other = _exchanged(sorted(set(paths)))
        return [other[path] for path in paths]
    return _replaced(bundle, paths, noise=kind == "noise")


def _exchanged(images: list[Path]) -> dict[Path, Path]:
    """Each image to another one: a seeded order, moved on by one, so that none stays and each is used once."""
    if len(images) == 1:
        raise ConfigError("C102", "ablate=shuffle needs two images or more.", "use ablate=blank.")
    order = random.Random(SEED).sample(images, len(images))
    return dict(zip(order, order[1:] + order[:1], strict=True))


def _replaced(bundle: Blanks, paths: Sequence[Path], noise: bool) -> list[Image.Image]:
    """One picture per size, shared: 9000 questions about 500 photos need a few pictures in memory, not 9000."""
    by_size: dict[tuple[int, int], Image.Image] = {}
    by_path: dict[Path, Image.Image] = {}
    for path in paths:
        if path not in by_path:
            blank = bundle.blank_image(path)
            if blank.size not in by_size:
                by_size[blank.size] = _noise(blank.size) if noise else blank
            by_path[path] = by_size[blank.size]
    return [by_path[path] for path in paths]


def _noise(size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    width, height = size
    return Image.frombytes("RGB", size, random.Random(f"{SEED} {width}x{height}").randbytes(3 * width * height))
