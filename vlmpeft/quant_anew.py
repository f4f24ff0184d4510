"""Quantised layers that are quantised again, from the weights they had before. Letters: d_in d_out widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.quant_weight import is_quantised, plain_weight

ORIGINAL = "original_weight"  # where `quant.quantise` leaves the weight of a layer that is asked to remember it


def take_original(layer: nn.Module) -> Tensor:
    """The weight (d_out, d_in) a layer had before it was quantised; the layer forgets it.

    Raises: ModelError M551 if it is not quantised, or does not remember.
    """
    if not is_quantised(layer):
        fix = "set quant.bits=4 or 8, or another init."
        raise ModelError("M551", "init=loftq makes up for quantisation, but the layer is not quantised.", fix)
    weight: Tensor | None = vars(layer).pop(ORIGINAL, None)
    if weight is None:
        fix = "call quantise(..., keep_originals=True) before tune."
        raise ModelError("M551", "init=loftq needs the weights from before quantisation, which are gone.", fix)
    return weight


def packed(layer: Any) -> tuple[Tensor, Any]:
    """What a quantised layer holds: its bits, on the CPU, and its scales. `put_packed` brings it back."""
    weight = layer.weight
    scales = weight.quant_state if hasattr(weight, "quant_state") else _scales_8(layer)
    return weight.data.to("cpu", copy=True), scales


def put_packed(layer: Any, bits: Tensor, scales: Any) -> None:
    """Make a quantised layer hold these bits and scales."""
    weight = layer.weight
    weight.data = bits.to(weight.device)
    if hasattr(weight, "quant_state"):
        weight.quant_state = layer.quant_state = scales
    elif weight.SCB is None:  # it has run: then its state holds both
        layer.state.CB, layer.state.SCB = weight.data, scales
    else:
        weight.CB, weight.SCB = weight.data, scales


def _scales_8(layer: Any) -> Tensor:
    scales: Tensor = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return scales


@torch.no_grad()
def requantise(layer: Any, weight: Tensor) -> Tensor:
    """Quantise another weight (d_out, d_in) into a layer as its own was. Returns: what it multiplies with now."""
    from bitsandbytes import functional

    old = layer.weight
    if hasattr(old, "quant_state"):
        bits, scales = functional.quantize_4bit(
            weight.to(old.device, old.quant_state.dtype).contiguous(), blocksize=old.blocksize,
            compress_statistics=old.compress_statistics, quant_type=old.quant_type, quant_storage=old.quant_storage,
        )  # fmt: skip
    else:
        bits, scales, _ = functional.int8_vectorwise_quant(weight.to(old.device, torch.float16).contiguous())
    put_packed(layer, bits, scales)
    return plain_weight(layer)
