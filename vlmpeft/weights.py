"""Reading and naming tuned tensors: strict, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError

PEFT_PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """A parameter's name as it is without adapters around it."""
    return name.replace(".base_layer.", ".")


def peft_key(name: str, root_prefix: str) -> str:
    """Key of a tensor in an adapter file: PEFT's prefix and the path below the adapter's root."""
    return PEFT_PREFIX + name.removeprefix(root_prefix)


def read_strict(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a safetensors file whose keys, shapes and finiteness must all be right.

    Raises: ModelError M502 naming the first missing, extra or misshapen tensor, M503 one that is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError("M502", f"no weights file {path}.", "check the directory.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ModelError("M502", f"{path} is not a safetensors file: {error}.", "restore it from another checkpoint.") from error
    for problem, names in (("lacks", expected.keys() - found.keys()), ("has the unknown", found.keys() - expected.keys())):
        if names:
            raise ModelError("M502", f"{path} {problem} tensor '{min(names)}' ({len(names)} such).", "was it trained with the same tuners and base?")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model's is {tuple(expected[name].shape)}"
            raise ModelError("M502", f"{path}: tensor '{name}' is {shapes}.", "was it trained with the same tuners and base?")
        if not torch.isfinite(tensor).all():
            raise ModelError("M503", f"{path}: tensor '{name}' holds NaN or infinity.", "use an earlier checkpoint.")
    return found


@torch.no_grad()
def assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
