"""Recipe files and `key=value` overrides to a `Recipe`. The only file that imports OmegaConf; plain dictionaries at once."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import vlmpeft.tuners  # noqa: F401  (registers the tuners)
from vlmpeft.errors import ConfigError, nearest
from vlmpeft.recipe import BatchConfig, OptimConfig, ProjectorConfig, Recipe, Stage
from vlmpeft.schema import as_plain, build
from vlmpeft.tuners.base import TUNERS, Tuner

ALIASES = {"vision": "vision.name", "language": "language.name", "projector": "projector.name"}
COMMON = ("title", "imports", "init", "vision", "language", "projector", "data", "eval", "run")
STAGE = ("source", "template", "system", "turns", "gradient_checkpointing", "tuners", "optim", "batch")
Plain = dict[str, Any]


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in resources.files("vlmpeft.recipes").iterdir() if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and apply overrides.

    Args:
        name_or_path: a shipped recipe's name or a YAML file.
        overrides: `section.key=value`, later ones win.

    Raises: ConfigError with the key, the allowed values and the nearest valid name.
    """
    merged = _read(name_or_path)
    for override in overrides:
        merged = _override(merged, override)
    for module in merged.get("imports") or ():
        _import(str(module))
    return _build(merged)


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML that `load_recipe` reads back to an equal one."""
    plain = as_plain(recipe)
    plain["projector"] = {"name": recipe.projector.name, **recipe.projector.options}
    for name, stage in recipe.stages.items():
        plain["stages"][name]["tuners"] = {k: {"kind": t.kind, **as_plain(t)} for k, t in stage.tuners.items()}
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _read(name_or_path: str) -> Plain:
    """A recipe file with what it is based on below it."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in recipe_names():
            raise ConfigError("C103", f"no recipe '{name_or_path}'{nearest(name_or_path, recipe_names())}")
        path = Path(str(resources.files("vlmpeft.recipes") / f"{name_or_path}.yaml"))
    if not path.is_file():
        raise ConfigError("C103", f"no recipe file {path}.", "give a name (see README) or a path.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError("C107", f"{path}: {_first_line(error)}") from error
    except Exception as error:  # PyYAML's errors derive from Exception alone
        raise ConfigError("C107", f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError("C107", f"{path} holds no sections.", "write section: {key: value}.")
    recipe: Plain = {str(k): v for k, v in values.items()}
    if base := recipe.pop("base", None):
        recipe = _merge(_read(str(base)), recipe)
    for name, stage in (recipe.get("stages") or {}).items():
        if isinstance(stage, dict) and (base := stage.pop("base", None)):
            below = {k: v for k, v in _read(str(base)).items() if k in STAGE or k in TUNERS}
            recipe["stages"][name] = _merge(below, stage)
    return recipe


def _merge(below: Plain, above: Mapping[str, Any]) -> Plain:
    """Deep merge; a projector of another name drops the options of the one below."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        other_projector = key == "projector" and isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("name", old.get("name")) != old.get("name")
        out[key] = _merge(dict(old), value) if isinstance(old, Mapping) and isinstance(value, Mapping) and not other_projector else value
    return out


def _override(recipe: Plain, text: str) -> Plain:
    key, equals, value = text.partition("=")
    if not equals or key.startswith("-") or not key:
        raise ConfigError("C108", f"expected key=value, got '{text}'.", "write for example optim.lr=1e-4.")
    key = ALIASES.get(key, key)
    head = key.split(".")[0]
    staged = "stages" in recipe
    known = {*COMMON, "stages"} | (set() if staged else {*STAGE, *TUNERS})
    if staged and head in {*STAGE, *TUNERS}:
        names = " or ".join(f"stages.{name}.{key}" for name in recipe["stages"])
        raise ConfigError("C105", f"{key} is set per stage in this recipe.", f"write {names}.")
    if staged and head == "stages" and len(key.split(".")) > 1 and key.split(".")[1] not in recipe["stages"]:
        raise ConfigError("C101", f"no stage '{key.split('.')[1]}'{nearest(key.split('.')[1], recipe['stages'])}")
    if head not in known:
        raise ConfigError("C101", f"no section '{head}'{nearest(head, known)}")
    try:
        change = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"]))
    except Exception as error:
        raise ConfigError("C108", f"{text}: {_first_line(error)}") from error
    return _merge(recipe, {str(k): v for k, v in change.items()} if isinstance(change, dict) else {})


def _build(values: Plain) -> Recipe:
    values = {k: v for k, v in values.items() if v is not None}
    if "stages" in values:
        extra = [k for k in values if k in STAGE or k in TUNERS]
        if extra:
            raise ConfigError("C105", f"'{extra[0]}' stands outside the stages.", "move it below stages.NAME.")
        stages = {str(k): _stage(v, f"stages.{k}") for k, v in values.pop("stages").items() if v is not None}
    else:
        own = {k: values.pop(k) for k in list(values) if k in STAGE or k in TUNERS}
        stages = {str(own.get("source", "instruct")): _stage(own, "")}
    if not stages:
        raise ConfigError("C106", "the recipe has no stage left.", "keep at least one of its stages.")
    known = [*COMMON, "stages", *STAGE, *TUNERS]
    for key in values:
        if key not in COMMON:
            raise ConfigError("C101", f"no section '{key}'{nearest(key, known)}")
    hints = typing.get_type_hints(Recipe)
    sections: Plain = {"stages": stages}
    for key, value in values.items():
        if key == "projector":
            sections[key] = _projector(value)
        elif dataclasses.is_dataclass(hints[key]):
            sections[key] = build(typing.cast(type, hints[key]), value, key)
        else:
            sections[key] = tuple(value) if key == "imports" else value
    for key in ("vision", "language"):
        if key not in sections:
            raise ConfigError("C106", f"{key}.name is not set.", f"write {key}=NAME.")
    return Recipe(**sections)


def _projector(values: object) -> ProjectorConfig:
    from vlmpeft.projectors import PROJECTORS

    if not isinstance(values, Mapping):
        raise ConfigError("C102", f"projector={values!r} is not a section.", "write projector.name=NAME.")
    name = str(values.get("name", "mlp2x_gelu"))
    options = {str(k): v for k, v in values.items() if k != "name"}
    known = PROJECTORS.options(name)
    for key in options:
        if key not in known:
            raise ConfigError("C104", f"projector '{name}' has no option '{key}'{nearest(key, known)}")
    return ProjectorConfig(name, options)


def _stage(values: object, where: str) -> Stage:
    if not isinstance(values, Mapping):
        raise ConfigError("C102", f"{where}={values!r} is not a section.")
    prefix = f"{where}." if where else ""
    plain = {k: v for k, v in values.items() if k in STAGE and k not in ("tuners", "optim", "batch") and v is not None}
    for key in values:
        if key not in STAGE and key not in TUNERS:
            raise ConfigError("C101", f"{where}: no key '{key}'{nearest(str(key), [*STAGE, *TUNERS])}")
    tuners: dict[str, Tuner] = {}
    for name, section in (values.get("tuners") or {}).items():
        if section is not None:
            tuners[str(name)] = _tuner(section, f"{prefix}tuners.{name}", None)
    for kind in TUNERS:
        if values.get(kind) is not None:
            tuners[kind] = _tuner(values[kind], f"{prefix}{kind}", kind)
    stage = build(Stage, plain, where or "stage")
    return dataclasses.replace(
        stage,
        tuners=tuners,
        optim=build(OptimConfig, values.get("optim") or {}, f"{prefix}optim"),
        batch=build(BatchConfig, values.get("batch") or {}, f"{prefix}batch"),
    )


def _tuner(section: object, where: str, kind: str | None) -> Tuner:
    if not isinstance(section, Mapping):
        raise ConfigError("C102", f"{where}={section!r} is not a section.", f"write {where}.key=value, or {where}=null to switch it off.")
    options = {k: v for k, v in section.items() if k != "kind"}
    kind = kind or section.get("kind")
    if kind is None:
        raise ConfigError("C106", f"{where}.kind is not set.", f"write {where}.kind=lora or another of: {', '.join(TUNERS)}.")
    return build(typing.cast(type, TUNERS.get(str(kind))), options, where)


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError("C109", f"imports: cannot import '{module}': {error}.", "put its folder on PYTHONPATH.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
