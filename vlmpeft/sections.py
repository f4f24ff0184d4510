"""Plain dictionaries to a `Recipe`: every section checked, every wrong key named with the nearest right one."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vlmpeft.conflicts import refuse_conflict, structure
from vlmpeft.errors import ConfigError, nearest
from vlmpeft.recipe import BatchConfig, OptimConfig, ProjectorConfig, Recipe, Stage
from vlmpeft.schema import build, convert, unknown_key
from vlmpeft.tuners import TUNERS, Full, TokenRows, Tuner

COMMON = (
    "title", "imports", "init", "vision", "language", "quant", "tokens", "projector", "data", "align", "eval",
    "retention", "diagnose", "run",
)  # fmt: skip
STAGE = ("source", "template", "system", "turns", "gradient_checkpointing", "tuners", "optim", "batch")
NOT_HERE = {  # keys that other tuners or libraries have, and what to write where there is no such key
    ("adalora", "ranks"): "set init_r, where all layers start, and r, their mean at the end: the budget parts it.",
    ("lora", "use_dora"): "use a tuner of kind dora.",
}
Plain = dict[str, Any]


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from its merged values. Raises: ConfigError C101-C106, ModelError M552."""
    values = {k: v for k, v in values.items() if v is not None}
    stages = _stages(values)
    known = [*COMMON, "stages", *STAGE, *TUNERS]
    for key in values:
        if key not in COMMON:
            raise unknown_section(key, known, stages)
    hints = typing.get_type_hints(Recipe)
    sections: Plain = {"stages": stages}
    for key, value in values.items():
        if key == "projector":
            sections[key] = _projector(value)
        elif dataclasses.is_dataclass(hints[key]):
            sections[key] = build(typing.cast(type, hints[key]), value, key)
        else:
            sections[key] = convert(value, hints[key], key)
    for key in ("vision", "language"):
        if key not in sections:
            raise ConfigError("C106", f"{key}.name is not set.", f"write {key}=NAME.")
    recipe = Recipe(**sections)
    return dataclasses.replace(recipe, stages=_with_token_rows(stages)) if recipe.tokens.add else recipe


def unknown_section(key: str, known: Iterable[str], stages: Collection[str]) -> ConfigError:
    """C101, with the nearest section there is. Args: key: a section, or a path that begins with it."""
    head = key.split(".")[0]
    if head in stages:
        return ConfigError("C101", f"'{head}' is a stage of this recipe, no section.", f"write stages.{key}.", head)
    hint = nearest(head, {*known, *(f"stages.{name}" for name in stages)})
    return ConfigError("C101", f"no section '{head}'{hint}", key=head)


def _with_token_rows(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """Stages that train the rows of new tokens, unless a tuner of their own does so."""
    out: dict[str, Stage] = {}
    for name, stage in stages.items():
        tuners = stage.tuners.values()
        own = any(isinstance(t, TokenRows) or (isinstance(t, Full) and t.part == "language") for t in tuners)
        rows: dict[str, Tuner] = {} if own else {"token_rows": TokenRows()}
        out[name] = dataclasses.replace(stage, tuners={**stage.tuners, **rows})
    return out


def _stages(values: Plain) -> dict[str, Stage]:
    """Take the stages out of a recipe's values: those of `stages`, or the one the recipe itself describes."""
    own = {k: values.pop(k) for k in list(values) if k in STAGE}
    if "stages" in values:
        if own:
            raise ConfigError("C105", f"'{next(iter(own))}' stands outside the stages.", "move it below stages.NAME.")
        sections = values.pop("stages")
        if not isinstance(sections, Mapping):
            raise ConfigError("C102", f"stages={sections!r} is not a section.", "write stages.NAME.key=value.")
        stages = {str(k): _stage(v, f"stages.{k}") for k, v in sections.items() if v is not None}
    else:
        stages = {str(own.get("source", "instruct")): _stage(own, "")}
    if not stages:
        raise ConfigError("C106", "the recipe has no stage left.", "keep at least one of its stages.")
    before: dict[str, Tuner] = {}
    for stage in stages.values():  # what would stop the second stage after the first has trained stops here
        for name, tuner in stage.tuners.items():
            if name not in before or structure(before[name]) != structure(tuner):
                refuse_conflict(name, tuner, before)
            before[name] = tuner
    return stages


def _projector(values: object) -> ProjectorConfig:
    from vlmpeft.projectors import PROJECTORS

    if not isinstance(values, Mapping):
        raise ConfigError("C102", f"projector={values!r} is not a section.", "write projector.name=NAME.")
    name = str(values.get("name", "mlp2x_gelu"))
    known = PROJECTORS.options(name)
    options: Plain = {}
    for key, value in values.items():
        if key not in known and key != "name":
            message = f"projector '{name}' has no option '{key}'{nearest(str(key), known)}"
            raise ConfigError("C104", message, key=f"projector.{key}")
        if key != "name":
            options[str(key)] = _option(value, known[key].annotation, f"projector.{key}")
    return ProjectorConfig(name, options)


def _option(value: object, annotation: object, where: str) -> object:
    """A projector's option, checked where its annotation is one of the plain types."""
    plain = {"int": int, "float": float, "str": str, "bool": bool}
    hint = plain.get(annotation if isinstance(annotation, str) else getattr(annotation, "__name__", ""))
    return value if hint is None else convert(value, hint, where)


def _stage(values: object, where: str) -> Stage:
    if not isinstance(values, Mapping):
        raise ConfigError("C102", f"{where}={values!r} is not a section.")
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in STAGE:
            raise unknown_key(where, str(key), [*STAGE, *TUNERS])
    nested = {key: {} if values.get(key) is None else values[key] for key in ("tuners", "optim", "batch")}
    if not isinstance(nested["tuners"], Mapping):
        raise ConfigError(
            "C102", f"{prefix}tuners={nested['tuners']!r} is not a section.", f"write {prefix}tuners.NAME.key=value."
        )
    tuners = {str(k): _tuner(v, f"{prefix}tuners.{k}") for k, v in nested["tuners"].items() if v is not None}
    plain = {k: v for k, v in values.items() if k not in nested and v is not None}
    return dataclasses.replace(
        build(Stage, plain, where),
        tuners=tuners,
        optim=build(OptimConfig, nested["optim"], f"{prefix}optim"),
        batch=build(BatchConfig, nested["batch"], f"{prefix}batch"),
    )


def _tuner(section: object, where: str) -> Tuner:
    if not isinstance(section, Mapping):
        fix = f"write {where}.key=value, or {where}=null to switch it off."
        raise ConfigError("C102", f"{where}={section!r} is not a section.", fix)
    options = {k: v for k, v in section.items() if k != "kind"}
    if section.get("kind") is None:
        fix = f"write {where}.kind=lora or another of: {', '.join(TUNERS)}."
        raise ConfigError("C106", f"{where}.kind is not set.", fix)
    kind = str(section["kind"])
    for key in options:
        if why := NOT_HERE.get((kind, str(key))):
            raise ConfigError("C101", f"{where}: a tuner of kind {kind} has no key '{key}'.", why)
    try:
        return build(typing.cast(type, TUNERS.get(kind)), options, where)
    except ConfigError as error:
        if where in error.message or (where == f"tuners.{kind}" and error.message.startswith(f"{kind}.")):
            raise
        raise ConfigError(error.code, f"{where}: {error.message}", error.fix) from error
