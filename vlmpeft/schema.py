"""Mappings to frozen dataclasses, with every unknown key and wrong type named in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from vlmpeft.errors import ConfigError, nearest

T = TypeVar("T")
SYNONYMS: Mapping[str, tuple[str, ...]] = {  # what a key is called elsewhere, and what it may be called here
    "rank": ("r",), "r": ("rank", "dim", "block_size"), "lora_r": ("r",), "lora_rank": ("r",), "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",), "use_rslora": ("rslora",), "init_lora_weights": ("init",), "rank_pattern": ("ranks",),
    "target_modules": ("targets",), "modules": ("targets",), "layers_to_transform": ("layers", "which"),
    "layers": ("which",), "keep": ("share",), "fraction": ("share",),
    "num_virtual_tokens": ("tokens",), "learning_rate": ("lr",), "max_steps": ("steps",), "epoch": ("epochs",),
    "num_train_epochs": ("epochs",), "warmup_ratio": ("warmup",), "lr_scheduler_type": ("schedule",),
    "max_grad_norm": ("clip",), "per_device_train_batch_size": ("micro",),
}  # fmt: skip


def build(cls: type[T], values: object, where: str) -> T:
    """Make a dataclass from a mapping.

    Args:
        cls: a dataclass of scalars, tuples and mappings.
        values: what a recipe gives for it.
        where: dotted path of the section, for messages; "" at the top.

    Raises: ConfigError C101 for an unknown key, C102 for a wrong type or range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError("C102", f"{where}={values!r} is not a section.", f"write {where}.key=value.")
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown_key(where, str(key), fields)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and values.get(name) is None:
            raise ConfigError("C106", f"{prefix}{name} is not set.", f"write {prefix}{name}=VALUE.")
    return cls(**{k: convert(v, hints[k], f"{prefix}{k}") for k, v in values.items()})


def unknown_key(where: str, key: str, known: Iterable[str]) -> ConfigError:
    """C101, with the key that is meant, if it is one of another library's, or else with the nearest there is."""
    names = set(known)
    meant = next((name for name in SYNONYMS.get(key, ()) if name in names), key)
    path = f"{where}.{key}" if where else key
    return ConfigError("C101", f"{where or 'recipe'}: no key '{key}'{nearest(meant, names)}", key=path)


def convert(value: object, hint: Any, where: str) -> Any:
    """Check a value against a type annotation and bring it into its form. Raises: ConfigError C102."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise _wrong(where, value, "one of " + ", ".join(map(str, arguments)))
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if (origin or hint) in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a section")
        return dict(value)
    return _convert_scalar(value, hint, where)


def _convert_union(value: object, options: Sequence[Any], where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    allowed = [o for o in options if o is not types.NoneType]
    for option in allowed:
        try:
            return convert(value, option, where)
        except ConfigError:
            continue
    return convert(value, allowed[-1], where)  # raises with the last option's message


def _convert_tuple(value: object, arguments: Sequence[Any], where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(where, value, "a list such as [a,b]")
    if arguments[-1] is Ellipsis:
        return tuple(convert(v, arguments[0], where) for v in value)
    if len(value) != len(arguments):
        raise _wrong(where, list(value), f"a list of {len(arguments)} values")
    return tuple(convert(v, a, where) for v, a in zip(value, arguments, strict=True))


def _convert_scalar(value: object, hint: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = _number(value, hint)
        if number is not None:
            return number
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    raise _wrong(where, value, names.get(hint, str(hint)))


def _number(value: float | str, hint: type) -> float | None:
    """A finite number of the type `hint`, or None."""
    try:
        if hint is int and not isinstance(value, float):
            with contextlib.suppress(ValueError):
                return int(value)  # exact where a float is not
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if hint is float:
        return number if math.isfinite(number) else None
    return int(number) if number.is_integer() else None


def _wrong(where: str, value: object, allowed: str) -> ConfigError:
    return ConfigError("C102", f"{where}={value!r} is not {allowed}.", f"write {where}= with {allowed}.", where)


def as_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as dictionaries and lists, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in value]
    return value
