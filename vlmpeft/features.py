"""Features of a frozen encoder, computed once and memory-mapped. Letters: v views, n tokens of one, d width."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vlmpeft import fs
from vlmpeft.encoder import Encoder
from vlmpeft.images import ImageReader
from vlmpeft.language import fingerprint

LAYOUT = 1  # of the cache file; a change makes old files unknown


class FeatureCache:
    """Image file -> (v, n, d) features in the encoder's dtype, from one file of the cache folder.

    Args: views: of each image file, in the order of the cache file. shape: n, d.
    """

    def __init__(self, file: Path, views: Mapping[Path, int], shape: tuple[int, int], dtype: torch.dtype) -> None:
        ends = list(itertools.accumulate(views.values(), initial=0))
        self.rows = dict(zip(views, itertools.starmap(slice, itertools.pairwise(ends)), strict=True))
        count = ends[-1] * shape[0] * shape[1]
        self.values = torch.from_file(str(file), shared=False, size=count, dtype=dtype).view(ends[-1], *shape)

    def __call__(self, path: Path) -> Tensor:
        """Returns: (v, n, d)."""
        return self.values[self.rows[path]]


def cache_features(encoder: Encoder, read: ImageReader, paths: Sequence[Path], batch_size: int = 32) -> FeatureCache:
    """Encode every image once, or find that it has been done.

    The key covers the encoder's weights, layer and dtype, the transform, and each file's path, size and time of change.
    One process builds, others that want the same file wait for it.

    Raises: DataError: as `open_image`.
    """
    views = {path: read.num_views(path) for path in sorted(set(paths))}
    dtype = next(encoder.parameters()).dtype
    shape = (encoder.num_tokens, encoder.width)
    size = sum(views.values()) * shape[0] * shape[1] * dtype.itemsize
    file = fs.cache_dir() / f"features-{_key(encoder, read, list(views))}.bin"
    if not _whole(file, size):
        with _building(file):
            if not _whole(file, size):
                _write(file, encoder, read, list(views), batch_size, size)
    return FeatureCache(file, views, shape, dtype)


def _key(encoder: Encoder, read: ImageReader, paths: Sequence[Path]) -> str:
    parameter = next(encoder.parameters())
    chosen = f"{getattr(encoder, 'layer', '')} {encoder.num_tokens}"  # not every encoder selects a layer
    digest = hashlib.sha256(f"{LAYOUT} {fingerprint(encoder)} {chosen} {read.transform} {parameter.dtype}".encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _whole(file: Path, size: int) -> bool:
    """Whether the file is there in full: files are renamed when complete, but a copy or a disk may have lost bytes."""
    return file.is_file() and file.stat().st_size == size


def _write(file: Path, encoder: Encoder, read: ImageReader, paths: Sequence[Path], batch_size: int, size: int) -> None:
    device = next(encoder.parameters()).device
    with fs.writing(file) as temporary, temporary.open("wb") as out:
        starts = range(0, len(paths), batch_size)
        for start in tqdm(starts, desc=f"encode {len(paths)} images ({size / 2**20:.0f} MiB)", unit="batch"):
            pixels = torch.cat([read(p) for p in paths[start : start + batch_size]])  # (views, 3, h, w)
            for views in pixels.split(batch_size):
                with torch.no_grad():
                    features = encoder(views.to(device)).to("cpu").contiguous()
                out.write(features.view(torch.uint8).numpy().tobytes())


@contextlib.contextmanager
def _building(file: Path) -> Iterator[None]:
    """Hold the right to build `file`, which ends with the process. What a killed builder left is removed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: everyone builds by themselves, the last rename stays
            yield
            return
        for left in file.parent.glob(f"{fs.TEMPORARY}{file.name}-*"):
            left.unlink(missing_ok=True)
        yield
