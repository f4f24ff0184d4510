"""Proof that tensors hold the same bits as before, without a copy of them: two sums over their bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers of as many bytes
PIECE = 1 << 22  # elements summed at once: an index of as many is held


def bit_sums(tensor: Tensor) -> tuple[int, int]:
    """Sum of a tensor's elements read as whole numbers, and the same weighted by their place in a piece."""
    flat = tensor.detach().contiguous().flatten().view(WORDS[tensor.element_size()])
    plain, weighted = 0, 0
    for piece in flat.split(PIECE):
        place = torch.arange(1, len(piece) + 1, device=piece.device)
        plain += int(piece.sum(dtype=torch.int64).item())
        weighted += int((piece * place).sum(dtype=torch.int64).item())
    return plain, weighted


def bits_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """`bit_sums` by name."""
    return {name: bit_sums(tensor) for name, tensor in tensors.items()}


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    floating = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    return [name for name, t in floating.items() if not torch.isfinite(t.detach()).all()]
