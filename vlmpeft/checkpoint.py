"""Complete model directories: written whole or not at all, verified before they are believed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vlmpeft import fs
from vlmpeft.anyres import TILES
from vlmpeft.build import Bundle, assemble, choose_device, choose_dtype, enter_stage
from vlmpeft.config import load_recipe, to_yaml
from vlmpeft.errors import ModelError
from vlmpeft.images import ImageTransform
from vlmpeft.manifest import verify, write_manifest
from vlmpeft.quant import QuantConfig
from vlmpeft.recipe import Recipe
from vlmpeft.start import check_base
from vlmpeft.tuners.base import ReadsOriginals
from vlmpeft.weights import PROJECTOR

MERGED = "language"  # the folder of a merged language model inside a model directory


def save(bundle: Bundle, target: Path, extra: Callable[[Path], Mapping[str, Any]] | None = None) -> None:
    """Write a complete model directory at `target`: temporary name, manifest last, fsync, rename, verify.

    Args: extra: writes more files into the directory and returns entries for the manifest.
    Raises: CheckpointError K201 disk full; ModelError M504 if something trained would not be saved.
    """
    with fs.new_directory(target) as directory:
        entries = dict(extra(directory)) if extra else {}
        saved = bundle.tuned.save(directory)
        projector = dict(bundle.model.projector.named_parameters())
        if not (directory / PROJECTOR).exists():  # trained in an earlier stage, or only aligned
            fs.write_tensors(directory / PROJECTOR, bundle.model.projector.state_dict())
        saved |= {f"projector.{name}" for name in projector}
        lost = sorted(n for n, p in bundle.model.named_parameters() if p.requires_grad and n not in saved)
        if lost:
            message = f"{len(lost)} trained tensors would not be saved, first '{lost[0]}'."
            raise ModelError("M504", message, "train them through a tuner.")
        fs.write_text(directory / "recipe.yaml", to_yaml(bundle.recipe))
        bundle.tokenizer.save_pretrained(directory / "tokenizer")
        fs.write_json(directory / "image_processor.json", dataclasses.asdict(bundle.image_transform))
        write_manifest(directory, {**_entries(bundle), **entries})
    verify(target)


def _entries(bundle: Bundle) -> dict[str, Any]:
    return {
        "base": {
            "vision": {"name": bundle.recipe.vision.name, "fingerprint": bundle.fingerprints["vision"]},
            "language": {"name": bundle.recipe.language.name, "fingerprint": bundle.fingerprints["language"]},
        },
        "quant": dataclasses.asdict(bundle.recipe.quant) if bundle.recipe.quant.bits else None,
        "stage": _stage_name(bundle),
        "template": bundle.stage.template,
        "tuners": {name: {"kind": a.tuner.kind, "part": a.tuner.part} for name, a in bundle.tuned.applied.items()},
        "tuner_stage": {name: _stage_of(bundle, name) for name in bundle.tuned.applied},
        "trained": sorted(bundle.tuned.tuned_names()),
    }


def _stage_name(bundle: Bundle) -> str:
    """The current stage's name; of stages with equal settings the very one."""
    same = [name for name, stage in bundle.recipe.stages.items() if stage is bundle.stage]
    return (same or [name for name, stage in bundle.recipe.stages.items() if stage == bundle.stage])[0]


def _stage_of(bundle: Bundle, tuner: str) -> str:
    """The last stage up to the current one whose recipe holds a tuner of this name."""
    names = list(bundle.recipe.stages)
    done = names[: names.index(_stage_name(bundle)) + 1]
    return [name for name in done if tuner in bundle.recipe.stages[name].tuners][-1]


def restore(bundle: Bundle, directory: Path, manifest: Mapping[str, Any]) -> None:
    """Bring the tuned weights of a verified directory into a freshly assembled bundle.

    Raises: ModelError M501 for another base, M502, M503 for tensors that do not fit.
    """
    check_base(bundle.recipe, bundle.fingerprints, directory, manifest)
    tuners = {name: bundle.recipe.stages[stage].tuners[name] for name, stage in manifest["tuner_stage"].items()}
    bundle.tuned.apply(tuners)
    restore_weights(bundle, directory)


def restore_weights(bundle: Bundle, directory: Path) -> None:
    """Read the tuned weights and the projector of a directory into a bundle that has its tuners."""
    bundle.tuned.load(directory)


def reload(bundle: Bundle, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Put a bundle's model anew on its base with the weights of `directory`: after FSDP2, which cannot be undone."""
    fresh = assemble(bundle.recipe, device, dtype, bundle.recipe.run.seed)
    restore(fresh, directory, verify(directory))
    bundle.model, bundle.tuned = fresh.model, fresh.tuned


def load(
    directory: str | Path, device: str = "auto", dtype: torch.dtype | None = None, quantised: bool = True
) -> Bundle:
    """A saved model, ready to be asked or trained on.

    Args:
        directory: `final/` or any `checkpoints/step-N/`.
        device: "auto" takes an accelerator if there is one.
        dtype: of the frozen weights; None chooses as training did.
        quantised: whether a base that was quantised in training is quantised again; False leaves its weights whole.

    Raises: CheckpointError K202 for a damaged directory; ModelError M501 for a changed base.
    """
    directory = Path(directory)
    manifest = verify(directory)
    recipe = load_recipe(
        str(directory / "recipe.yaml"), ["run.allow_base_mismatch=false"]
    )  # that was for its own start
    if (directory / MERGED / "config.json").is_file():  # wherever the directory has been moved
        language = dataclasses.replace(recipe.language, name=str(directory / MERGED))
        recipe = dataclasses.replace(recipe, language=language)
    if not quantised:
        recipe = _unquantised(recipe)
    where = choose_device(device)
    bundle = assemble(recipe, where, dtype or choose_dtype(recipe.run.precision, where), recipe.run.seed)
    restore(bundle, directory, manifest)
    enter_stage(bundle, recipe.stages[manifest["stage"]])
    bundle.image_transform = _transform(json.loads((directory / "image_processor.json").read_text(encoding="utf-8")))
    bundle.model.eval()
    return bundle


def _unquantised(recipe: Recipe) -> Recipe:
    """A recipe for whole weights; what its tuners learned on quantised ones is the same update there."""
    stages = {}
    for name, stage in recipe.stages.items():
        tuners = {k: t.on_whole_weights() if isinstance(t, ReadsOriginals) else t for k, t in stage.tuners.items()}
        stages[name] = dataclasses.replace(stage, tuners=tuners)
    return dataclasses.replace(recipe, quant=QuantConfig(), stages=stages)


def _transform(values: Mapping[str, Any]) -> ImageTransform:
    tiles = tuple((rows, columns) for rows, columns in values.get("tiles", TILES))  # older directories name none
    return ImageTransform(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"]), "tiles": tiles})
