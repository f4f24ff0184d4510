"""A run's directory: held by one process, holding one recipe, and cut back to where its last checkpoint stands."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmpeft import fs, resume
from vlmpeft.changes import compare
from vlmpeft.config import to_yaml
from vlmpeft.errors import CheckpointError, ConfigError
from vlmpeft.loop import METRICS
from vlmpeft.manifest import MANIFEST, verify
from vlmpeft.recipe import Recipe
from vlmpeft.resume import Position

LOCK = "run.lock"
RECIPE = "recipe.yaml"
FINAL = "final"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process.

    Raises: CheckpointError K211 while another process trains there; ConfigError C111 if nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = fs.acquire(directory / LOCK)
    except OSError as error:
        what = "is a file" if directory.is_file() else f"cannot be written: {error.strerror}"
        raise ConfigError("C111", f"run.dir={directory} {what}.", "choose another run.dir.") from error
    try:
        yield
    finally:
        fs.release(directory / LOCK, handle)


def finished(directory: Path) -> bool:
    """Whether a run has come to its end there."""
    return (directory / FINAL / MANIFEST).is_file()


def open_directory(directory: Path, recipe: Recipe) -> None:
    """Make a held directory ready: a fresh one, or one with a run of the same recipe to go on with.

    Raises: ConfigError C112 for a used one with run.resume=never; CheckpointError K210 for a run of another recipe,
    K202 for a damaged `final`.
    """
    for folder in (directory, directory / "checkpoints", directory / "answers"):
        fs.sweep(folder)
    if _used(directory) and recipe.run.overwrite:
        _move_away(directory)
    if _used(directory) and (changed := _refuse_used(directory, recipe)):
        tqdm.write(f"changed for what is left of the run: {'; '.join(changed)}")
    if finished(directory):
        _check_final(directory / FINAL)
    else:
        fs.write_text(directory / RECIPE, to_yaml(recipe))


def foresee(directory: Path, recipe: Recipe) -> tuple[str, Path | None]:
    """What a run would find in a directory, without touching it. Returns: in words; the checkpoint it would go on from.

    Raises: as `locked`, `open_directory` and `find_checkpoint`.
    """
    there = fs.existing(directory)
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = f"{there} cannot be written" if there.is_dir() else f"{there} is a file"
        raise ConfigError("C111", f"run.dir={directory}: {what}.", "choose another run.dir.")
    if not _used(directory) or recipe.run.overwrite:
        return ("an earlier run there would be moved away" if _used(directory) else "empty"), None
    _refuse_used(directory, recipe)
    if finished(directory):
        return f"already complete, so training would do nothing: {directory / FINAL}", None
    found = find_checkpoint(directory, recipe)
    return ("a run that has saved nothing yet" if found is None else f"training would go on from {found}"), found


def _refuse_used(directory: Path, recipe: Recipe) -> list[str]:
    """Raise for a used directory that `recipe` cannot go on in; see `open_directory`. Returns: as `compare`."""
    if recipe.run.resume == "never":
        message = f"run.dir={directory} holds a run."
        raise ConfigError("C112", message, "set run.resume=auto, run.overwrite=true or another run.dir.")
    return compare(directory / RECIPE, recipe) if (directory / RECIPE).is_file() else []


def _used(directory: Path) -> bool:
    return any((directory / name).exists() for name in (RECIPE, "checkpoints", FINAL))


def _move_away(directory: Path) -> None:
    """Move the run in `directory` to `<directory>.old-<time>`; the recipe goes last: until then it is still a run."""
    moved = directory.with_name(f"{directory.name}.old-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    moved.mkdir()
    paths = sorted((p for p in directory.iterdir() if p.name != LOCK), key=lambda p: p.name == RECIPE)
    for path in paths:
        fs.replace(path, moved / path.name)
    tqdm.write(f"the earlier run is in {moved}")


def _check_final(final: Path) -> None:
    try:
        verify(final)
    except CheckpointError as error:
        raise CheckpointError(
            error.code, error.message, f"delete {final} and run again: the last checkpoint makes it anew."
        ) from error


def find_checkpoint(directory: Path, recipe: Recipe) -> Path | None:
    """The checkpoint to go on from; newer ones that are damaged are named and passed over.

    Raises: CheckpointError K205 for a `run.resume` that is no checkpoint, K202 for a damaged one, K207 if none of the
    run's checkpoints is whole, K210 for one of another recipe.
    """
    if recipe.run.resume == "never":
        return None
    if recipe.run.resume == "auto":
        found, rejected = resume.newest_valid(directory)
        for reason in rejected:
            tqdm.write(f"vlmpeft: warning: passed over a damaged checkpoint: {reason}")
        if found is None and rejected:
            message = f"none of the {len(rejected)} checkpoints in {directory / 'checkpoints'} is whole."
            raise CheckpointError("K207", message, "set run.overwrite=true to start anew, or another run.dir.")
    else:
        found = Path(recipe.run.resume)
        if not (found / resume.STATE).is_file():
            message = f"run.resume={found} is no checkpoint."
            raise CheckpointError("K205", message, "name a checkpoints/step-N folder, auto or never.")
        verify(found)
    if found is not None:
        compare(found / RECIPE, recipe)
    return found


def check_data(directory: Path, facts: dict[str, Any]) -> None:
    """Refuse data that is not what a checkpoint was trained on. Raises: CheckpointError K210 naming the stage."""
    for stage, then in verify(directory)["facts"]["data"].items():
        now = facts["data"].get(stage, {})
        if now.get("fingerprint") != then["fingerprint"]:
            was, found = (f"{d.get('used')} samples with fingerprint {d.get('fingerprint')}" for d in (then, now))
            message = f"stage {stage}: {then['file']} is not what {directory} was trained on: {was}, now {found}."
            fix = "bring the file back, or set run.overwrite=true or another run.dir."
            raise CheckpointError("K210", message, fix)


def known_best(directory: Path, position: Position) -> Position:
    """`position` without its best evaluation if that checkpoint is not (or no longer) in the run's directory."""
    if position.best_step is None:
        return position
    try:
        verify(resume.step_directory(directory, position.best_step))
    except CheckpointError as error:
        tqdm.write(
            f"vlmpeft: warning: the best checkpoint so far is lost, later ones are compared anew: {error.line()}"
        )
        return Position(
            position.stage,
            position.step,
            position.total,
            position.evaluated,
            loss=position.loss,
            seconds=position.seconds,
            processes=position.processes,
        )
    return position


def cut_metrics(directory: Path, stages: Sequence[str], position: Position) -> None:
    """Drop logged steps that will be trained again, and a last line that a kill cut short."""
    path = directory / METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            at = (list(stages).index(row["stage"]), row["step"])
            here = (position.stage, position.step)
            again = "visual_mass" in row or (
                not position.evaluated and any(key.startswith("eval") for key in row)
            )  # made at `here` once more
            if at < here or (at == here and not again):
                kept.append(line + "\n")
    fs.write_text(path, "".join(kept))
