"""Linear layers whose weights lie in 4 or 8 bits, as bitsandbytes makes them: how to tell them, what they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vlmpeft.errors import ModelError


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer's weight lies in bits that no optimizer can move and no adapter can be added into."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight (d_out, d_in) a linear layer multiplies with: its own, or a dequantised copy; below any adapters."""
    while isinstance(below := getattr(layer, "base_layer", None), nn.Module):
        layer = below
    linear: Any = layer
    if not is_quantised(linear):
        weight: Tensor = linear.weight
        return weight
    from bitsandbytes import functional

    if (state := getattr(linear, "quant_state", None)) is not None:
        return functional.dequantize_4bit(linear.weight.data, state)
    scales = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB  # it moves at the first forward
    return functional.int8_vectorwise_dequant(linear.weight.data, scales)


def refuse_training(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ModelError M559 if one of the parameters of these names is a weight or bias of a quantised layer."""
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Linear) and is_quantised(layer):  # an adapter's own tensors are beside the layer
            message = f"{name} belongs to a layer in 4 or 8 bits, which cannot be trained itself."
            raise ModelError("M559", message, "put adapters on it (lora), or train without quant: quant=null.")
