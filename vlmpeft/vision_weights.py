"""Weights files for encoders: safetensors, or a pickled state dict converted once without unpickling code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.errors import ModelError

By = Literal["name", "order"]
Shapes = tuple[str, Sequence[int], Sequence[int]]  # a tensor's name, its shape in the file and in the model


@dataclass(frozen=True)
class Misfit:
    """How a file and a model differ. missing: the file lacks them. unexpected: only the file holds them."""

    missing: Sequence[str]
    unexpected: Sequence[str]
    shapes: Sequence[Shapes]

    def refuse(self, file: Path) -> None:
        """Raises: ModelError M542 naming the first of each kind, if there are any."""
        said = []
        if self.shapes:
            name, there, here = self.shapes[0]
            sizes = f"{tuple(there)} in the file and {tuple(here)} in the model"
            said.append(f"{len(self.shapes)} of another shape, first '{name}': {sizes}")
        if self.missing:
            said.append(f"{len(self.missing)} missing, first '{self.missing[0]}'")
        if self.unexpected:
            said.append(f"{len(self.unexpected)} unknown to the model, first '{self.unexpected[0]}'")
        if said:
            misfit = f"the tensors of {file.name} do not fit the model: {'; '.join(said)}."
            raise ModelError("M542", misfit, "check vision.name and vision.weights.")


def load_weights(model: nn.Module, file: Path, by: By, optional: Iterable[str] = ()) -> None:
    """Load a weights file into `model`, all of it.

    Args: optional: names of layers the model need not have from the file, such as a classifier.
    Raises: ModelError M540 without the file, M542 naming the first that does not fit.
    """
    found, expected = read_weights(file), model.state_dict()
    found = _by_order(found, expected, file) if by == "order" else _part(found, expected)
    unneeded = tuple(f"{name}." for name in optional)
    found = {k: v for k, v in found.items() if not k.startswith(unneeded)}
    needed = {k: v for k, v in expected.items() if not k.startswith(unneeded)}
    missing = [k for k in needed if k not in found]
    unexpected = [k for k in found if k not in needed]
    both = [k for k in needed if k in found]
    shapes = [(k, found[k].shape, needed[k].shape) for k in both if found[k].shape != needed[k].shape]
    Misfit(missing, unexpected, shapes).refuse(file)
    model.load_state_dict(found, strict=False)  # all but the optional ones are there


def _by_order(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path) -> Mapping[str, Tensor]:
    """The file's tensors under the model's names, first to first. Raises: ModelError M542 if their number differs."""
    if file.suffix == ".safetensors":
        raise ModelError("M542", f"{file.name} keeps no order: safetensors sorts.", "set vision.weights_by=name.")
    if len(found) != len(expected):
        counts = f"{file.name} holds {len(found)} tensors, the model {len(expected)}."
        raise ModelError("M542", counts, "set vision.weights_by=name.")
    return dict(zip(expected, found.values(), strict=True))


def _part(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The encoder's tensors, of a file that may hold them below a name: `module.`, `visual.`, `backbone.`.

    What stands beside that name, such as a text tower, is left out.
    """
    first = next(iter(expected))
    names = ["", *(k.removesuffix(first) for k in found if k.endswith(f".{first}"))]
    prefix = max(names, key=lambda p: sum(p + k in found for k in expected))
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """Tensors of a safetensors file, or of a pickled state dict converted once to safetensors (order kept).

    Raises: ModelError M540 if there is no such file, M542 if it holds no plain tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ModelError("M540", f"no weights file {file}.", "check vision.weights.")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ModelError("M542", f"{file} is not a safetensors file: {error}.", "fetch it again.") from error
    converted = fs.cache_dir() / f"vision-{file.stem}-{fs.sha256(file)[:12]}.safetensors"
    if not converted.is_file():
        tensors = _unpickled(file)
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
