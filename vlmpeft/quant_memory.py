"""What weights take in memory, measured on a model and foretold from shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft.parts import Parts
from vlmpeft.quant import QuantConfig
from vlmpeft.quant_weight import is_quantised
from vlmpeft.tuners.sites import is_norm
from vlmpeft.tuners.targets import ALL_LINEAR, find_linears

SCALES = 256  # scales that share a scale of their own, in double quantisation; QLoRA, section 3
CODES_4, CODES_8 = 4 * 16, 4 * 256  # bytes of a table of 16 or 256 values
OFFSET = 4  # bytes of the mean of a layer's scales
GIB = 2**30


@dataclass(frozen=True)
class WeightBytes:
    """Memory of a model's weights.

    Args:
        weights: how many lie in few bits.
        packed: bytes of these with their scales.
        tables: bytes of what each of their layers has besides, whatever its size.
        rest: bytes of all other parameters.
    """

    weights: int
    packed: int
    tables: int
    rest: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.packed + self.tables + self.rest

    @property
    def bits(self) -> float:
        """Bits of a quantised weight with its share of the scales."""
        return 8 * self.packed / max(1, self.weights)

    def line(self) -> str:
        """For people."""
        few = f"{self.weights:,} in {self.bits:.3f} bits ({(self.packed + self.tables) / GIB:.2f} GiB)"
        return f"weights: {self.total / GIB:.2f} GiB = {few} + the rest ({self.rest / GIB:.2f} GiB)"


def quantised_bytes(model: nn.Module) -> WeightBytes:
    """What the weights of a model take now: every parameter once, and the scales and tables of quantised layers."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear) and is_quantised(m)]
    packed = tables = 0
    for layer in layers:
        scales, others = _state_4(layer.quant_state) if hasattr(layer, "quant_state") else _state_8(layer)
        packed += _bytes([layer.weight.data, *scales])
        tables += _bytes(others)
    inside = {id(layer.weight) for layer in layers}
    rest = _bytes(p for p in model.parameters() if id(p) not in inside)
    return WeightBytes(sum(m.in_features * m.out_features for m in layers), packed, tables, rest)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _state_4(state: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Scales and tables of a 4-bit layer."""
    if not state.nested:
        return [state.absmax], [state.code]
    return [state.absmax, state.state2.absmax], [state.code, state.state2.code, state.offset]


def _state_8(layer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Scales of an 8-bit layer, one a row; they move at the first forward."""
    return [layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB], []


def planned_bytes(model: nn.Module, parts: Parts, config: QuantConfig, dtype: torch.dtype) -> WeightBytes:
    """What the weights will take, from shapes: a model on the meta device, not quantised.

    4 bits, block 64, double: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight (QLoRA, section 3).
    Args: dtype: of the frozen weights; those of the projector are in fp32.
    """
    linears: list[Any] = []
    if config.bits is not None:
        linears = list(find_linears(model, parts, "language", ALL_LINEAR).values())
    packed = sum(_packed(m.out_features, m.in_features, config) for m in linears)
    tables = 0
    if config.bits == 4:
        tables = len(linears) * (CODES_4 + (CODES_8 + OFFSET if config.double else 0))
    inside, wide = {id(m.weight) for m in linears}, _wide(parts, config)
    rest = 0
    for parameter in model.parameters():
        if id(parameter) not in inside:
            rest += parameter.numel() * (4 if id(parameter) in wide else dtype.itemsize)
    return WeightBytes(sum(m.in_features * m.out_features for m in linears), packed, tables, rest)


def bytes_by_parameter(model: nn.Module, parts: Parts, config: QuantConfig, dtype: torch.dtype) -> dict[int, int]:
    """`planned_bytes` of every parameter, by its id."""
    linears: list[Any] = []
    if config.bits is not None:
        linears = list(find_linears(model, parts, "language", ALL_LINEAR).values())
    tables = CODES_4 + (CODES_8 + OFFSET if config.double else 0) if config.bits == 4 else 0
    packed = {id(m.weight): _packed(m.out_features, m.in_features, config) + tables for m in linears}
    wide = _wide(parts, config)
    rest = {id(p): p.numel() * (4 if id(p) in wide else dtype.itemsize) for p in model.parameters()}
    return rest | packed


def _packed(rows: int, columns: int, config: QuantConfig) -> int:
    """Bytes of a quantised (rows, columns) weight with its scales."""
    weights = rows * columns
    if config.bits == 8:
        return weights + 4 * rows
    blocks = math.ceil(weights / config.block)
    scales = blocks + 4 * math.ceil(blocks / SCALES) if config.double else 4 * blocks
    return math.ceil(weights / 2) + scales


def _wide(parts: Parts, config: QuantConfig) -> set[int]:
    """Ids of the parameters that lie in fp32: the projector's, and beside quantised weights those of the norms."""
    wide = {id(p) for p in parts.projector.parameters()}
    norms = [m for m in parts.language.modules() if is_norm(m)] if config.bits else []
    return wide | {id(p) for m in norms for p in m.parameters()}
