"""A soup (arXiv:2203.05482): the mean of what several runs of one recipe trained, as a model directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmpeft.build import Bundle
from vlmpeft.checkpoint import load, save
from vlmpeft.config import load_recipe
from vlmpeft.conflicts import structure
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.manifest import verify

SAME = ("stage", "template", "tuners", "tuner_stage", "trained")


def soup(runs: Sequence[Path], target: Path) -> Bundle:
    """Average runs that differ in their seeds, data or learning rates, and write the result.

    A and B of a LoRA are averaged apart, as every other tensor: right for runs from one start. The mean of updates of
    unrelated adapters is what `adapter_merge` computes.

    Returns: the model. Raises: ConfigError C102 for fewer than two runs; ModelError M582 for runs that differ in base,
    tuners or stage; M502 for tensors that do not fit; CheckpointError K202 for a damaged directory.
    """
    if len(runs) < 2:
        raise ConfigError("C102", f"a soup of {len(runs)} runs.", "name at least two.")
    first = _identity(runs[0])
    for run in runs[1:]:
        for key, value in _identity(run).items():
            if value != first[key]:
                message = f"{run} differs from {runs[0]} in its {key}: {value!r} against {first[key]!r}."
                raise ModelError("M582", message, "average runs of one recipe.")
    bundle = load(runs[0], device="cpu")
    sums: dict[str, Tensor] = {}
    for run in runs:
        bundle.tuned.load(run)
        for name, tensor in _trained(bundle).items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    with torch.no_grad():
        for name, tensor in _trained(bundle).items():
            tensor.copy_(sums[name] / len(runs))
    save(bundle, target, lambda _: {"soup": [str(run) for run in runs]})
    return bundle


def _identity(run: Path) -> dict[str, Any]:
    """What must agree: the bases by fingerprint, and everything that says what the tensors mean."""
    manifest = verify(run)
    recipe = load_recipe(str(run / "recipe.yaml"))
    tuners = {name: recipe.stages[stage].tuners[name] for name, stage in manifest["tuner_stage"].items()}
    return {
        "base": {part: base["fingerprint"] for part, base in manifest["base"].items()},
        **{key: manifest[key] for key in SAME},
        "settings": {name: structure(tuner) for name, tuner in tuners.items()},
        "projector": (recipe.projector.name, recipe.projector.options),
    }


def _trained(bundle: Bundle) -> dict[str, Tensor]:
    """Every tensor that a model directory holds, the projector's running statistics included; numbers of a kind that
    has no mean are left out."""
    tuned = {k: p for one in bundle.tuned.applied.values() for k, p in one.parameters.items()}
    projector = {f"projector.{k}": v for k, v in bundle.model.projector.state_dict().items()}
    return {k: v for k, v in {**projector, **tuned}.items() if v.is_floating_point()}
