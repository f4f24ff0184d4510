"""What differs between the recipe of a run and the one it is to go on with, and what of that may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmpeft.config import load_recipe
from vlmpeft.errors import CheckpointError
from vlmpeft.recipe import OVERRIDABLE, Recipe
from vlmpeft.schema import as_plain

RUN_KEYS = (
    "dir", "device", "resume", "overwrite", "log_every", "save_every", "eval_every", "keep", "patience", "trackers",
    "project", "timeout_s", "override", "allow_base_mismatch",
)  # fmt: skip
CHECKING_KEYS = ("data.workers", "data.verify_images")
MAY_CHANGE = ("title", "imports", "eval", "retention", *CHECKING_KEYS, *(f"run.{key}" for key in RUN_KEYS))
AFTERWARDS = ("eval.blank", "eval.ablate")  # asked of the finished model alone
SHOWN = 8  # changed keys in one message


def compare(old: Path, recipe: Recipe) -> list[str]:
    """Refuse to go on under a recipe that trains differently.

    Returns: what differs by `run.override`. Raises: CheckpointError K210 naming the keys that differ otherwise.
    """
    found = [d for d in _differences(_plain(load_recipe(str(old))), _plain(recipe)) if not _may_change(d[0], recipe)]
    lines = {key: f"{key} {a!r} -> {b!r}" for key, a, b in found}
    wrong = [line for key, line in lines.items() if not _overridden(key, recipe)]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        message = f"{old.parent} holds a run of another recipe: {'; '.join(wrong[:SHOWN])}{more}."
        fix = "set them back, or set run.overwrite=true or another run.dir"
        rates = ", or go on with the new rates by run.override=[KEY]" if any(map(_is_rate, wrong)) else ""
        raise CheckpointError("K210", message, f"{fix}{rates}.")
    return list(lines.values())


def _is_rate(line: str) -> bool:
    return OVERRIDABLE.fullmatch(line.split(" ")[0]) is not None


def _overridden(key: str, recipe: Recipe) -> bool:
    """Whether run.override names a key, with or without its stage and `tuners`."""
    stage, _, own = key.removeprefix("stages.").partition(".")
    plain = own.removeprefix("tuners.")
    names = {key, own, plain, f"stages.{stage}.{plain}"}
    return not names.isdisjoint(recipe.run.override)


def _plain(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = as_plain(recipe)
    for name, stage in recipe.stages.items():
        plain["stages"][name]["tuners"] = {k: {"kind": t.kind, **as_plain(t)} for k, t in stage.tuners.items()}
    return plain


def _may_change(key: str, recipe: Recipe) -> bool:
    if key.startswith("eval.") and key not in AFTERWARDS and recipe.run.best_by != "loss":
        return False  # the questions choose the best checkpoint
    return any(key == known or key.startswith(f"{known}.") for known in MAY_CHANGE)


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        found = [d for k in keys for d in _differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
        return found or ([(where, list(old), list(new))] if list(old) != list(new) and where == "stages" else [])
    return [] if old == new else [(where, old, new)]
