"""Reads the steering weights that LLaVA-Steering (arXiv:2412.12359) saves: one torch file a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlmpeft.errors import ModelError
from vlmpeft.steering.units import Units

FILE = re.compile(r"intkey_layer\.(\d+)\.comp\.block_output.*\.bin")
KEYS = {"weight": "A", "bias": "b", "rotate_layer": "U"}


@torch.no_grad()
def load_reference(units: Units, directory: str | Path) -> None:
    """Copy the files of a folder `mores/language_model` into units of the same layers and rank.

    Args: units: of every layer, constrained, with a bias, as `MoReS(site="block_output", layers="all")` makes them.
    Raises: ModelError M502 for a missing layer, key or shape, or a file that is no plain dictionary of tensors.
    """
    files = {int(m[1]): p for p in sorted(Path(directory).iterdir()) if (m := FILE.fullmatch(p.name))}
    layers = units.rotation.shape[0]
    if sorted(files) != list(range(layers)):
        message = f"{directory} holds steering of layers {sorted(files)}, the model has {layers}."
        raise ModelError("M502", message, "give the folder mores/language_model of a checkpoint of the same base.")
    found = [_read(files[layer]) for layer in range(layers)]
    targets = {"rotate_layer": units.rotation, "weight": units.source, "bias": units.bias}
    for key, target in targets.items():
        values = torch.stack([one[key].float() for one in found])
        if target is None or values.shape != target.shape:
            wanted = "no bias" if target is None else tuple(target.shape)
            message = f"{directory}: {KEYS[key]} is {tuple(values.shape)}, the units have {wanted}."
            raise ModelError("M502", message, "apply MoReS with the rank it was trained with.")
        target.copy_(values)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or a hostile file makes the reader raise
        reason = str(error).splitlines()[0]
        raise ModelError(
            "M502", f"{path} cannot be read: {reason}", "it must hold tensors and nothing else."
        ) from error
    missing = KEYS.keys() - (found.keys() if isinstance(found, Mapping) else set())
    if missing:
        raise ModelError("M502", f"{path} lacks '{min(missing)}'.", "is it a file of LLaVA-Steering's MoReS?")
    return found
