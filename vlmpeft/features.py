"""Features of a frozen encoder, computed once and memory-mapped. Letters: n tokens, d width."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vlmpeft import fs
from vlmpeft.images import ImageTransform, open_image
from vlmpeft.language import fingerprint
from vlmpeft.vision import Encoder


class FeatureCache:
    """Image file -> (n, d) features in the encoder's dtype, from one file of the cache folder."""

    def __init__(self, file: Path, rows: dict[Path, int], shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.rows = rows
        count = len(rows) * shape[0] * shape[1]
        self.values = torch.from_file(str(file), shared=False, size=count, dtype=dtype).view(len(rows), *shape)

    def __call__(self, path: Path) -> Tensor:
        """Returns: (n, d)."""
        return self.values[self.rows[path]]


def cache_features(encoder: Encoder, transform: ImageTransform, paths: Sequence[Path], batch_size: int = 32) -> FeatureCache:
    """Encode every image once, or find that it has been done.

    The key covers the encoder's weights, layer and dtype, the transform, and each file's path, size and time of change.
    """
    unique = sorted(set(paths))
    parameter = next(encoder.parameters())
    digest = hashlib.sha256(f"{fingerprint(encoder)} {getattr(encoder, 'layer', '')} {transform} {parameter.dtype}".encode())
    for path in unique:
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    file = fs.cache_dir() / f"features-{digest.hexdigest()[:16]}.bin"
    shape = (encoder.num_tokens, encoder.width)
    if not file.is_file():
        size = len(unique) * shape[0] * shape[1] * parameter.element_size()
        with fs.writing(file) as temporary, temporary.open("wb") as out:
            bar = tqdm(range(0, len(unique), batch_size), desc=f"encode {len(unique)} images ({size / 2**20:.0f} MiB)", unit="batch")
            for start in bar:
                pixels = torch.stack([transform(open_image(p)) for p in unique[start : start + batch_size]])
                features = encoder(pixels.to(parameter.device)).to("cpu").contiguous()
                out.write(features.view(torch.uint8).numpy().tobytes())
    return FeatureCache(file, {p: i for i, p in enumerate(unique)}, shape, parameter.dtype)
