"""What an optimizer keeps of every parameter, in bytes, and where."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from vlmpeft.optim import PAGED

SMALL = 4096  # bitsandbytes keeps the moments of tensors below in 32 bits
BLOCK = 256  # values of a moment in 8 bits that share a scale; arXiv:2110.02861, section 2.1
MAPS = 2 * 256 * 4  # bytes of the tables of the 256 values, one a moment, shared by all tensors


def optimizer_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of the two moments of AdamW over parameters, after its first step. Args: name: as `optim.name`."""
    sizes = [p.numel() for p in parameters]
    if not name.endswith("8bit"):
        return sum(8 * n for n in sizes)
    large = [n for n in sizes if n >= SMALL]
    few = sum(2 * n + 2 * 4 * math.ceil(n / BLOCK) for n in large) + (MAPS if large else 0)
    return few + sum(8 * n for n in sizes if n < SMALL)


def is_paged(name: str, device: str) -> bool:
    """Whether CUDA moves the moments to the host when the device is full."""
    return name.startswith(PAGED) and device == "cuda"
