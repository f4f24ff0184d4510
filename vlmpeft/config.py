"""Recipe files and `key=value` overrides to a `Recipe`. The only file that imports OmegaConf; plain values after."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import vlmpeft.steering  # noqa: F401  its tuners are found by their kind
from vlmpeft.errors import ConfigError, VlmpeftError, nearest
from vlmpeft.llava_source import check_decided, decided_by
from vlmpeft.overlay import merge, normalised, of_kind
from vlmpeft.recipe import Recipe
from vlmpeft.schema import as_plain, convert
from vlmpeft.sections import COMMON, STAGE, Plain, build_recipe, unknown_section
from vlmpeft.tuners import TUNERS
from vlmpeft.yaml_file import line_of, read_yaml_text

COMPARE = "compare"  # the section that makes a comparison of a recipe
ALIASES = {"vision": "vision.name", "language": "language.name", "projector": "projector.name"}


def recipe_names(comparisons: bool = False) -> list[str]:
    """The recipes that come with the package. Args: comparisons: those with a section `compare` instead."""
    files = [f for f in resources.files("vlmpeft.recipes").iterdir() if f.name.endswith(".yaml")]
    chosen = (f.name for f in files if (f"\n{COMPARE}:" in f.read_text(encoding="utf-8")) is comparisons)
    return sorted(name.removesuffix(".yaml") for name in chosen)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and apply overrides.

    Args:
        name_or_path: a shipped recipe's name or a YAML file.
        overrides: `section.key=value`, later ones win; another encoder or projector is chosen before its options are.

    Raises: ConfigError with the key, the allowed values and the nearest valid name.
    """
    changes = sorted(map(_parse, overrides), key=lambda change: change[0] not in ("vision.name", "projector.name"))
    for key, value in changes:
        if key == "imports":
            _import(value)
    merged = _read(name_or_path)
    if COMPARE in merged:
        message = f"{name_or_path} compares several recipes."
        raise ConfigError("C105", message, f"run python -m vlmpeft.compare recipe={name_or_path}.")
    decided = decided_by(dict(changes).get("init", merged.get("init")))
    merged = merge(merged, decided)
    for key, value in changes:
        merged = _override(merged, key, value)
    try:
        check_decided(merged, decided)
        return build_recipe(merged)
    except ConfigError as error:
        wrong = _plain_path(error.key)
        typed = any(wrong[: len(path)] == path for path in (_plain_path(key) for key, _ in changes))
        raise error if typed or not error.key else _located(error, _files(name_or_path)) from error


def load_comparison(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Plain, Plain]:
    """A recipe with a section `compare`. Args: as `load_recipe`; `compare.key=value` is of that section.

    Returns: the section; the values all runs share, which `recipe_of` makes a recipe of.
    Raises: as `load_recipe`; ConfigError C106 without that section.
    """
    shared = _read(name_or_path)
    section: Plain = {COMPARE: shared.pop(COMPARE, None)}
    if not isinstance(section[COMPARE], Mapping):
        known = ", ".join(recipe_names(comparisons=True))
        raise ConfigError("C106", f"{name_or_path} has no section {COMPARE}.", f"write recipe= with one of: {known}.")
    for key, value in map(_parse, overrides):
        if key.split(".")[0] == COMPARE:
            for part in reversed(key.split(".")):
                value = {part: value}
            section = merge(section, value)
        else:
            shared = _override(shared, key, value)
    return section[COMPARE], shared


def recipe_of(values: Mapping[str, Any], *changes: Mapping[str, Any]) -> Recipe:
    """The recipe that values describe once changes are merged into them; null takes a key out. Raises: ConfigError."""
    for change in changes:
        values = merge(values, normalised(dict(change)))
    return build_recipe(merge(values, decided_by(values.get("init"))))


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML that `load_recipe` reads back to an equal one."""
    plain = as_plain(recipe)
    plain["projector"] = {"name": recipe.projector.name, **recipe.projector.options}
    for name, stage in recipe.stages.items():
        plain["stages"][name]["tuners"] = {k: {"kind": t.kind, **as_plain(t)} for k, t in stage.tuners.items()}
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _read(name_or_path: str, above: tuple[Path, ...] = ()) -> Plain:
    """A recipe file with what it is based on below it. Args: above: the files that are based on this one."""
    path = _path(name_or_path, above)
    if path in above:
        raise ConfigError("C107", f"{path} is based on itself.", "take the key `base` out of one of the files.")
    text = read_yaml_text(path)
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except Exception as error:  # OmegaConf's and PyYAML's errors have no base but Exception
        raise ConfigError("C107", f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not isinstance(values.get("stages") or {}, dict):
        raise ConfigError("C107", f"{path} holds no sections.", "write section: {key: value}.")
    recipe: Plain = {str(k): v for k, v in values.items()}
    _import(recipe.get("imports"))
    if base := recipe.pop("base", None):
        recipe = merge(_read(str(base), (*above, path)), recipe)
    for name, stage in (recipe.get("stages") or {}).items():
        if isinstance(stage, dict) and (base := stage.pop("base", None)):
            below = {k: v for k, v in _read(str(base), (*above, path)).items() if k in STAGE}
            recipe["stages"][name] = merge(below, stage)
    return normalised(recipe)


def _files(name_or_path: str, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files a recipe is read from, each before those it is based on."""
    path = _path(name_or_path, above)
    yield path
    values = OmegaConf.to_container(OmegaConf.create(read_yaml_text(path)))
    if isinstance(values, dict) and values.get("base"):
        yield from _files(str(values["base"]), (*above, path))


def _plain_path(key: str) -> list[str]:
    """A key's parts as a shorthand has them, without `tuners`."""
    return [part for part in key.split(".") if part != "tuners"]


def _located(error: ConfigError, files: Iterable[Path]) -> ConfigError:
    """The error with file and line of its key, where a file holds it."""
    for path in files:
        text = read_yaml_text(path)
        line = line_of(text, error.key.split(".")) or line_of(text, _plain_path(error.key))
        if line is not None:
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            return ConfigError(error.code, f"{shown} line {line}: {error.message}", error.fix, error.key)
    return error


def _path(name_or_path: str, above: Sequence[Path]) -> Path:
    """The file of a recipe; a relative path is looked up beside the file that names it."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = recipe_names() + recipe_names(comparisons=True)
        if name_or_path not in known:
            raise ConfigError("C103", f"no recipe '{name_or_path}'{nearest(name_or_path, known)}")
        path = Path(str(resources.files("vlmpeft.recipes") / f"{name_or_path}.yaml"))
    elif above:
        path = above[-1].parent / path
    if not path.is_file():
        raise ConfigError("C103", f"no recipe file {path}.", "give a name (see README) or a path.")
    return path.resolve()


def _parse(text: str) -> tuple[str, Any]:
    """`key=value` as a key and a value. Raises: ConfigError C108."""
    key, equals, value = text.partition("=")
    if not equals or key.startswith("-") or not all(key.split(".")):
        raise ConfigError("C108", f"expected key=value, got '{text}'.", "write for example optim.lr=1e-4.")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)["value"]  # type: ignore[index, call-overload]
    except Exception as error:
        raise ConfigError("C108", f"{text}: {' '.join(str(error).split())}") from error
    number = isinstance(parsed, int | float) and not isinstance(parsed, bool)
    if number and str(parsed) != value and not key.startswith("projector."):
        parsed = value  # a folder called 007 or 2024_01 stays what it is; fields of numbers read 1e-4 as well
    return ALIASES.get(key, key), parsed


def _override(recipe: Plain, key: str, value: Any) -> Plain:
    head, *rest = key.split(".")
    stages = recipe.get("stages")
    known = {*COMMON, "stages"}
    if not isinstance(stages, Mapping):
        known |= {*STAGE, *TUNERS}
        if head == "stages" and rest and any(k in recipe for k in STAGE):
            own = ".".join(rest[1:]) or "a key of the stage"
            raise ConfigError(
                "C105", f"{key}: this recipe is one stage, whose keys stand by themselves.", f"write {own}."
            )
    elif head in {*STAGE, *TUNERS}:
        names = " or ".join(f"stages.{name}.{key}" for name in _stages_with(stages, head, rest))
        raise ConfigError("C105", f"{key} is set per stage in this recipe.", f"write {names}.")
    elif head == "stages" and rest and rest[0] not in stages:
        raise ConfigError("C101", f"no stage '{rest[0]}'{nearest(rest[0], map(str, stages))}")
    if head not in known:
        raise unknown_section(key, known, stages if isinstance(stages, Mapping) else ())
    for part in reversed(rest):
        value = {part: value}
    return normalised(merge(recipe, {head: value}))


def _stages_with(stages: Mapping[str, Any], head: str, rest: Sequence[str]) -> list[str]:
    """Stages that have what an override without a stage names; all of them if none has."""

    def has(stage: object) -> bool:
        tuners = stage.get("tuners") if isinstance(stage, Mapping) else None
        if head in TUNERS:
            return bool(of_kind(tuners, head))
        if head == "tuners" and rest:
            return isinstance(tuners, Mapping) and rest[0] in tuners
        return isinstance(stage, Mapping) and head in stage

    return [str(name) for name, stage in stages.items() if has(stage)] or [str(name) for name in stages]


def _import(modules: object) -> None:
    """Import modules of the user's own, from the current folder too, as `python -m` finds them."""
    if modules is None:
        return
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.append(here)
    for module in convert(modules, tuple[str, ...], "imports"):
        try:
            importlib.import_module(module)
        except VlmpeftError:
            raise
        except Exception as error:  # whatever the module does while it loads
            message = f"imports: cannot import '{module}': {type(error).__name__}: {error}."
            raise ConfigError(
                "C109", message, "name a module (no path, no .py) in this folder or on PYTHONPATH."
            ) from error
