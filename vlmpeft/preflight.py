"""What is checked before the first step: the recipe without a model, then every record of every stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmpeft.build import Bundle
from vlmpeft.data import Prepared, prepare, split_held_out, supervised_share
from vlmpeft.errors import ConfigError
from vlmpeft.features import cache_features
from vlmpeft.images import open_image
from vlmpeft.recipe import Recipe
from vlmpeft.stage import StageData
from vlmpeft.template import TurnEncoder
from vlmpeft.trackers import check_trackers

Say = Callable[[str], None]


def data_file(recipe: Recipe, stage: str) -> Path:
    """The file a stage reads."""
    return Path(str(getattr(recipe.data, recipe.stages[stage].source)))


def check_recipe(recipe: Recipe) -> None:
    """What can be wrong without a model is found before anything is written.

    Raises: ConfigError C106, C110; and as `check_trackers`.
    """
    for name, stage in recipe.stages.items():
        key = f"data.{stage.source}"
        if getattr(recipe.data, stage.source) is None:
            message = f"stage {name} reads {key}, which is not set."
            raise ConfigError("C106", message, f"write {key}=FILE data.images=DIR.")
        if not stage.tuners:
            raise ConfigError("C106", f"stage {name} trains nothing.", "give it a tuner, for example lora.r=16.")
        if not data_file(recipe, name).is_file():
            raise ConfigError("C110", f"{key}={data_file(recipe, name)}: no such file.", f"check {key}.")
    if recipe.data.images and not Path(recipe.data.images).is_dir():
        raise ConfigError("C110", f"data.images={recipe.data.images}: no such folder.", "check data.images.")
    check_trackers(recipe.run.trackers)


def prepare_stages(bundle: Bundle, directory: Path, say: Say) -> tuple[dict[str, StageData], dict[str, Any]]:
    """Check and encode the data of every stage before the first one trains.

    Args:
        directory: where lists of bad records go.
        say: told what became of the records.

    Returns: data by stage; what a manifest records of it.
    Raises: DataError.
    """
    recipe, data = bundle.recipe, bundle.recipe.data
    prepared = {name: _prepare(bundle, name, directory, say) for name in recipe.stages}
    load: Any = lambda path: bundle.image_transform(open_image(path))  # noqa: E731
    workers = data.workers
    paths = [path for found in prepared.values() for sample in found.samples for path in sample.images]
    if data.cache_features and paths:
        vision: Any = bundle.model.vision
        load, workers = cache_features(vision, bundle.image_transform, paths), 0
    stages = {}
    for name, found in prepared.items():
        train, held_out = split_held_out(found.samples, data.held_out, recipe.run.seed)
        stages[name] = StageData(train, held_out, load, workers)
    return stages, {"data": {name: _facts(found, data_file(recipe, name)) for name, found in prepared.items()}}


def _prepare(bundle: Bundle, name: str, directory: Path, say: Say) -> Prepared:
    recipe, stage = bundle.recipe, bundle.recipe.stages[name]
    encoder = TurnEncoder(bundle.tokenizer, stage.template, bundle.image_tokens, stage.system)
    report = directory / f"bad_samples-{name}.jsonl"
    found = prepare(data_file(recipe, name), recipe.data, encoder, stage.turns == "independent", report)
    supervised, tokens = supervised_share(found.samples)
    line = f"{name}: records {found.records:,} = used {len(found.samples):,} + skipped {len(found.skipped):,}"
    say(f"{line}; {supervised:,} of {tokens:,} tokens supervised ({supervised / tokens:.1%})")
    return found


def _facts(found: Prepared, file: Path) -> dict[str, Any]:
    counts = {"records": found.records, "used": len(found.samples), "skipped": len(found.skipped)}
    return {"file": str(file), "fingerprint": found.fingerprint, **counts}
