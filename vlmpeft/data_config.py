"""The data section of a recipe: which files, which images, and what becomes of records that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmpeft.anyres import MAX_TILES, TILES, Grid, Merge
from vlmpeft.errors import ConfigError
from vlmpeft.images import MAX_PIXELS, PILLOW_LIMIT
from vlmpeft.tuners.base import check


@dataclass(frozen=True)
class DataFile:
    """One of the files of a stage. weight: how often an epoch sees each record. images: in place of data.images."""

    path: str
    weight: float = 1.0
    images: str | None = None

    def __post_init__(self) -> None:
        check(0 < self.weight <= 1000, f"weight of {self.path}", self.weight, "a number in (0, 1000]")


DataFiles = str | tuple[str | DataFile, ...]


@dataclass(frozen=True)
class DataConfig:
    """Where the data is and how it is read.

    pretrain, instruct: the file of each stage, or a list of files or of {path, weight, images} (see docs/data.md).
    images: folder the records' paths start from. duplicate_ids: "keep" takes records of one id as they are.
    truncate: what happens to a sample longer than max_length: "right" cuts text at its end (never an image, and at
    least one answer token stays), "skip" leaves it out, "error" stops. cache_features: encode every image once, keep
    the features on disk. held_out: share of the records kept for the evaluation loss. image_mode: see `ImageTransform`;
    tiles: rows and columns of the grids "anyres" chooses from. tile_merge: "flat" keeps views one after another,
    "spatial_unpad" joins the tiles' rows, drops padding and closes every row with a learned newline, as LLaVA-NeXT.
    max_image_pixels: of a file's width times height.
    """

    pretrain: DataFiles | None = None
    instruct: DataFiles | None = None
    images: str | None = None
    image_mode: Literal["pad", "square", "anyres"] = "pad"
    tiles: tuple[Grid, ...] = TILES
    tile_merge: Merge = "flat"
    max_image_pixels: int = MAX_PIXELS
    max_length: int = 2048
    truncate: Literal["right", "skip", "error"] = "right"
    on_bad_sample: Literal["error", "skip"] = "error"
    max_bad_fraction: float = 0.001
    duplicate_ids: Literal["error", "keep"] = "error"
    verify_images: Literal["header", "full", "none"] = "header"
    auto_image_token: bool = False
    workers: int = 2
    cache_features: bool = False
    held_out: float = 0.0

    def __post_init__(self) -> None:
        check(self.max_length >= 16, "data.max_length", self.max_length, "at least 16 tokens")
        check(0 <= self.held_out <= 0.5, "data.held_out", self.held_out, "a share in [0, 0.5]")
        check(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "a share in [0, 1]")
        check(self.workers >= 0, "data.workers", self.workers, "0 or more")
        sides = [side for grid in self.tiles for side in grid]
        inside = bool(sides) and all(1 <= side <= MAX_TILES for side in sides)
        check(inside, "data.tiles", self.tiles, f"[[rows,columns],...] with 1 to {MAX_TILES} of each")
        for name in ("pretrain", "instruct"):
            check(getattr(self, name) != (), f"data.{name}", "[]", "at least one file")
        pixels = self.max_image_pixels
        check(1 <= pixels <= PILLOW_LIMIT, "data.max_image_pixels", pixels, f"1 to {PILLOW_LIMIT}, what Pillow opens")

    def files(self, source: str) -> tuple[DataFile, ...]:
        """The files of a stage. Args: source: "pretrain" or "instruct"."""
        given = getattr(self, source) or ()
        listed = (given,) if isinstance(given, str) else given
        return tuple(DataFile(file) if isinstance(file, str) else file for file in listed)


def require_folders(images: str | None, files: Sequence[DataFile]) -> None:
    """Raise ConfigError C110 unless the folder of images, and those that files name, are there."""
    named = {"data.images": images, **{f"{file.path}: images": file.images for file in files}}
    for key, folder in named.items():
        if folder and not Path(folder).is_dir():
            raise ConfigError("C110", f"{key}={folder}: no such folder.", "check its name.")
