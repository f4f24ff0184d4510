"""Weights files for encoders: safetensors, or a pickled state dict converted once without unpickling code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.errors import ModelError

By = Literal["name", "order"]


def load_weights(model: nn.Module, path: Path, by: By) -> None:
    """Load a weights file into `model`, all of it. Raises: ModelError M542 naming the first that does not fit."""
    found, expected = _read(path), model.state_dict()
    if by == "order":
        if path.suffix == ".safetensors":
            raise ModelError("M542", f"{path.name} keeps no order: safetensors sorts.", "set vision.weights_by=name.")
        if len(found) != len(expected):
            counts = f"{path.name} holds {len(found)} tensors, the model {len(expected)}."
            raise ModelError("M542", counts, "set vision.weights_by=name.")
        found = dict(zip(expected, found.values(), strict=True))
    wrong = [k for k in expected if k not in found or found[k].shape != expected[k].shape]
    wrong += [k for k in found if k not in expected]
    if wrong:
        misfit = f"{path.name} does not fit the model: {len(wrong)} tensors differ, first '{wrong[0]}'"
        raise ModelError(
            "M542", f"{misfit}{_shapes(wrong[0], found, expected)}.", "check vision.name and vision.weights."
        )
    model.load_state_dict(found, strict=True)


def _shapes(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    if name in found and name in expected:
        return f", which has shape {tuple(found[name].shape)} there and {tuple(expected[name].shape)} in the model"
    return ", which only the file holds" if name in found else ", which the file lacks"


def _read(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a safetensors file, or of a pickled state dict converted once to safetensors (order kept)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError("M540", f"no weights file {path}.", "check vision.weights.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ModelError("M542", f"{path} is not a safetensors file: {error}.", "fetch it again.") from error
    converted = fs.cache_dir() / f"vision-{path.stem}-{fs.sha256(path)[:12]}.safetensors"
    if not converted.is_file():
        tensors = _unpickled(path)
        fs.write_tensors(converted, {f"{i:05d}|{k}": v.clone() for i, (k, v) in enumerate(tensors.items())})
    tensors = load_file(converted)  # safetensors sorts by name: the index in front restores the file's order
    return {k.split("|", 1)[1]: tensors[k] for k in sorted(tensors)}


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a pickled checkpoint: itself, or what it holds under "state_dict" or "model"."""
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            "M542", f"{path} holds no plain tensors: {reason}", "give a state dict or safetensors."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelError("M542", f"{path} is no state dict.", "give a file that maps names to tensors.")
    return loaded
