"""What is checked before the first step: the recipe without a model, then every record of every stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmpeft.build import Bundle
from vlmpeft.data_config import DataFile, require_folders
from vlmpeft.errors import ConfigError, EnvironmentFault
from vlmpeft.features import cache_features
from vlmpeft.images import ImageReader
from vlmpeft.mixture import split_held_out, supervised_share
from vlmpeft.optim import check_optimizer, optimizer_note
from vlmpeft.prepare import Prepared, prepare
from vlmpeft.quant import check_quant
from vlmpeft.quant_memory import quantised_bytes
from vlmpeft.recipe import Recipe
from vlmpeft.record_encoder import Preparation
from vlmpeft.stage import StageData
from vlmpeft.trackers import check_trackers
from vlmpeft.tuners.base import ReadsOriginals

Say = Callable[[str], None]


def data_files(recipe: Recipe, stage: str) -> tuple[DataFile, ...]:
    """The files a stage reads."""
    return recipe.data.files(recipe.stages[stage].source)


def check_recipe(recipe: Recipe) -> None:
    """What can be wrong without a model is found before anything is written.

    Raises: ConfigError C106, C110; EnvironmentFault E410; and as `check_trackers`.
    """
    check_quant(recipe.quant)
    for name, stage in recipe.stages.items():
        key = f"data.{stage.source}"
        if getattr(recipe.data, stage.source) is None:
            message = f"stage {name} reads {key}, which is not set."
            raise ConfigError("C106", message, f"write {key}=FILE data.images=DIR.")
        if not stage.tuners:
            raise ConfigError("C106", f"stage {name} trains nothing.", "give it a tuner, for example lora.r=16.")
        check_optimizer(stage.optim.name)
        loftq = [k for k, t in stage.tuners.items() if isinstance(t, ReadsOriginals) and t.needs_originals]
        if loftq and recipe.quant.bits is None:
            message = f"stage {name}: tuner '{loftq[0]}' has init=loftq, but nothing is quantised."
            raise ConfigError("C102", message, "set quant.bits=4 or 8, or another init.")
        for file in data_files(recipe, name):
            if not Path(file.path).exists():
                raise ConfigError("C110", f"{key}={file.path}: no such file.", f"check {key}.")
        require_folders(recipe.data.images, data_files(recipe, name))
    check_trackers(recipe.run.trackers)


def refuse_sharded(recipe: Recipe) -> None:
    """Raise EnvironmentFault E433 for what FSDP2 cannot spread: it cuts tensors along their first axis."""
    ours = [f"stages.{name}.optim.name={s.optim.name}" for name, s in recipe.stages.items() if s.optim.name != "adamw"]
    found = ([f"quant.bits={recipe.quant.bits}"] if recipe.quant.bits else []) + ours
    if recipe.run.best_by != "loss":
        message = f"run.best_by={recipe.run.best_by} asks one process's whole model, which FSDP2 has spread over all."
        raise EnvironmentFault("E433", message, "launch with recipes/launch/ddp.yaml, or set run.best_by=loss.")
    if found:
        message = f"{found[0]} keeps blocks of values under one scale, which FSDP2 would cut apart."
        raise EnvironmentFault("E433", message, "launch with recipes/launch/ddp.yaml.")


def start_lines(bundle: Bundle, device: str) -> list[str]:
    """What a run says of quantised weights and of its optimizers before it starts."""
    quant, stages = bundle.recipe.quant, bundle.recipe.stages.values()
    lines = [quant.line(device), quantised_bytes(bundle.model).line()] if quant.bits else []
    notes = dict.fromkeys(optimizer_note(stage.optim.name, device) for stage in stages)
    return lines + [note for note in notes if note is not None]


def prepare_stages(bundle: Bundle, directory: Path, say: Say) -> tuple[dict[str, StageData], dict[str, Any]]:
    """Check and encode the data of every stage before the first one trains.

    Args:
        directory: where lists of bad records go.
        say: told what became of the records.

    Returns: data by stage; what a manifest records of it.
    Raises: DataError.
    """
    recipe, data = bundle.recipe, bundle.recipe.data
    read = ImageReader(bundle.image_transform)
    reports = {name: directory / f"bad_samples-{name}.jsonl" for name in recipe.stages}
    prepared = {name: prepare_stage(bundle, name, read, reports[name], say) for name in recipe.stages}
    load: Callable[[Path], Tensor] = read
    workers = data.workers
    paths = [path for found in prepared.values() for path in found.samples.images()] if data.cache_features else []
    if paths:
        vision: Any = bundle.model.vision
        load, workers = cache_features(vision, read, paths), 0
    stages = {}
    for name, found in prepared.items():
        train, held_out = split_held_out(found.samples, data.held_out, recipe.run.seed)
        stages[name] = StageData(train, held_out, load, workers)
    return stages, {"data": {name: _facts(found, data_files(recipe, name)) for name, found in prepared.items()}}


def preparation(bundle: Bundle, name: str, read: ImageReader) -> Preparation:
    """How a stage's records become samples."""
    stage = bundle.recipe.stages[name]
    independent, size = stage.turns == "independent", bundle.image_transform.size
    encoder = bundle.turn_encoder(stage)
    return Preparation(bundle.recipe.data, encoder, independent, read.tiling, size, bundle.recipe.tokens.add)


def prepare_stage(bundle: Bundle, name: str, read: ImageReader, report: Path | None, say: Say) -> Prepared:
    """Check and encode the records of a stage. Args: report: where its list of bad records goes. Raises: DataError."""
    found = prepare(data_files(bundle.recipe, name), preparation(bundle, name, read), report)
    supervised, tokens = supervised_share(found.samples)
    line = f"{name}: records {found.records:,} = used {len(found.samples):,} + skipped {len(found.skipped):,}"
    say(f"{line}; {supervised:,} of {tokens:,} tokens supervised ({supervised / tokens:.1%})")
    if cut := found.samples.cut:
        say(f"{name}: samples cut off at data.max_length={bundle.recipe.data.max_length}: {cut:,}")
    if found.animated:
        say(f"{name}: images of several frames or pages, of which the first is shown: {found.animated:,}")
    return found


def _facts(found: Prepared, files: Sequence[DataFile]) -> dict[str, Any]:
    counts = {"records": found.records, "used": len(found.samples), "skipped": len(found.skipped)}
    counts["animated"] = found.animated
    return {"file": ", ".join(file.path for file in files), "fingerprint": found.fingerprint, **counts}
