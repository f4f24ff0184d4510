"""What a run starts from: the projector of another run, on the base parts it was trained on, or a LLaVA's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmpeft.errors import CheckpointError, ModelError
from vlmpeft.llava_source import HF, read_projector
from vlmpeft.manifest import MANIFEST, verify
from vlmpeft.projectors.base import NEWLINE
from vlmpeft.recipe import Recipe
from vlmpeft.vlm import VLM
from vlmpeft.weights import PROJECTOR, assign, check_tensors, read_tensors

Prints = Mapping[str, str]  # fingerprints of the base parts, by `vision` and `language`


def check_base(recipe: Recipe, prints: Prints, directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raises: ModelError M501 if the base parts are not those `directory` was trained on and the recipe wants them."""
    if recipe.run.allow_base_mismatch:
        return
    for part, base in manifest["base"].items():
        here = prints[part]
        if here != base["fingerprint"]:
            trained = f"{directory} was trained on {part} '{base['name']}' ({base['fingerprint']})"
            message = f"{trained}, but '{getattr(recipe, part).name}' here is {here}."
            fix = "load it on the base it was trained on, or set run.allow_base_mismatch=true."
            raise ModelError("M501", message, fix)


def start_from(model: VLM, recipe: Recipe, prints: Prints, init: str | Path) -> None:
    """Take the projector of another run's model directory, as stage 2 starts from stage 1, or that of `hf:NAME`.

    Raises: ModelError M501 for another base; M533 if that run tuned more than the projector: this run would not carry
    it; M502 for another shape, or a newline that only one of them has.
    """
    if str(init).startswith(HF):
        _take(model, read_projector(str(init)), Path(str(init).removeprefix(HF)), f"init={init}")
        return
    directory = Path(init)
    if (directory / "config.json").is_file() and not (directory / MANIFEST).is_file():
        message = f"init={directory} is a directory of transformers, no model directory."
        raise CheckpointError("K202", message, f"write init={HF}{directory}.")
    manifest = verify(directory)
    check_base(recipe, prints, directory, manifest)
    more = [name for name in manifest["trained"] if not name.startswith("projector.")]
    if more:
        message = f"init={directory} also tuned '{more[0]}' ({len(more)} tensors), which this run cannot start from."
        raise ModelError("M533", message, "export a merged base first.")
    _take(model, read_tensors(directory / PROJECTOR), directory / PROJECTOR, f"init={directory}")


def _take(model: VLM, found: dict[str, Tensor], file: Path, start: str) -> None:
    """Put the tensors found in a file into the projector. Args: start: the file's model, for messages."""
    state = model.projector.state_dict()
    if (NEWLINE in found) != (NEWLINE in state):
        merge = "spatial_unpad" if NEWLINE in found else "flat"
        message = f"{start} was trained with data.tile_merge={merge}, this run has another."
        raise ModelError("M502", message, f"set data.tile_merge={merge}.")
    assign(state, check_tensors(file, found, state))
