"""A recipe's values laid over another's, and shorthand sections brought to their long form; plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmpeft.errors import ConfigError
from vlmpeft.sections import Plain
from vlmpeft.tuners import TUNERS

OF_ENCODER = ("weights", "weights_by", "image_size", "mean", "std", "compat")  # what is true of one encoder only


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Plain:
    """Deep merge; an encoder or projector of another name drops the options of the one below."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        out[key] = merge(_surviving(key, old, value), value) if both else value  # type: ignore[arg-type]
    return out


def _surviving(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of a section is still meant once `new` names another part."""
    if key not in ("vision", "projector") or new.get("name", old.get("name")) == old.get("name"):
        return old
    return {} if key == "projector" else {k: v for k, v in old.items() if k not in OF_ENCODER}


def normalised(recipe: Plain) -> Plain:
    """The recipe with every shorthand section (`lora: {r: 64}`) below `tuners`."""
    stages = recipe.get("stages")
    if isinstance(stages, Mapping):
        return {**recipe, "stages": {k: _without_shorthand(v, f"stages.{k}.") for k, v in stages.items()}}
    return _without_shorthand(recipe, "")


def _without_shorthand(section: Any, prefix: str) -> Any:
    """A shorthand section means the one tuner of its kind, or a new one named after the kind."""
    kinds = [k for k in TUNERS if isinstance(section, Mapping) and k in section]
    if not kinds:
        return section
    out = {k: v for k, v in section.items() if k not in kinds}
    tuners = dict(out.get("tuners") or {})
    for kind in kinds:
        named = [name for name in of_kind(tuners, kind) if name != kind]
        own = tuners.get(kind) is not None or not named
        if len(named) > 1 and not own:
            fix = "write " + " or ".join(f"{prefix}tuners.{name}" for name in named) + "."
            raise ConfigError("C105", f"'{prefix}{kind}' could be any of {len(named)} tuners.", fix)
        name = kind if own else named[0]
        value = section[kind]
        tuners[name] = {"kind": kind, **(tuners.get(name) or {}), **value} if isinstance(value, Mapping) else value
    return {**out, "tuners": tuners}


def of_kind(tuners: object, kind: str) -> list[str]:
    """Names of the tuners of one kind."""
    found = tuners.items() if isinstance(tuners, Mapping) else ()
    return [str(name) for name, section in found if isinstance(section, Mapping) and section.get("kind") == kind]
