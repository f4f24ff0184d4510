"""Command lines of benchmarks: `key=value` in, tables out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmpeft.errors import ConfigError, nearest

SOURCES = ("questions", "data")  # what the questions of a benchmark are named by
ASKING = ("out", "images", "ablate", "batch_size", "max_new_tokens", "device", "overwrite", "suffix", "method", "wrong")


def parse_arguments(
    argv: Sequence[str], defaults: Mapping[str, Any], required: Sequence[str], doc: str
) -> dict[str, Any]:
    """Read `key=value` arguments; a value takes the type of its default, required ones are text.

    Raises:
        ConfigError: C101 for an unknown key, C102 for a missing key or a value of the wrong type.
        SystemExit: after `--help`, which prints `doc` and the keys with their defaults.
    """
    if "--help" in argv or "-h" in argv:
        keys = [f"  {key}=...  required" for key in required]
        keys += [f"  {key}={json.dumps(value).strip(chr(34))}" for key, value in defaults.items()]
        print(doc.strip(), "", "Keys:", *keys, sep="\n")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            name = key.lstrip("-")
            known = name in defaults or name in required
            example = f"write {name}=VALUE." if known else f"write for example {required[0]}=PATH."
            raise ConfigError("C102", f"expected key=value, got '{argument}'.", example)
        if key not in defaults and key not in required:
            raise _unknown(key, [*required, *defaults])
        if key in values:
            raise ConfigError("C102", f"{key} is given twice.", "keep one.")
        values[key] = _convert(key, value, defaults[key]) if key in defaults else value
    for key in required:
        if not values.get(key):
            raise ConfigError("C102", f"{key} is not given.", f"add {key}=PATH; --help lists every key.")
    return {**defaults, **values}


def _unknown(key: str, known: Sequence[str]) -> ConfigError:
    """The error for a key that another benchmark, or the other way to call this one, has."""
    if key == "model" and "answers" in known:
        return ConfigError("C101", "model is given beside answers.", "keep one: given answers are scored as they are.")
    if key in ASKING and "answers" in known and "model" not in known:
        message = f"{key} is given beside answers: they are scored as they are, and the figures printed."
        return ConfigError("C101", message, f"leave {key} out, or ask a model with model=DIR.")
    if key in SOURCES and (own := next((name for name in known if name in SOURCES), None)):
        return ConfigError("C101", f"no key '{key}' here.", f"the questions of this benchmark are named by {own}=PATH.")
    return ConfigError("C101", f"no key '{key}'{nearest(key, known)}")


def _convert(key: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ConfigError("C102", f"{key}={value}: expected true or false.")
        return value.lower() == "true"
    if isinstance(default, int):
        if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
            raise ConfigError("C102", f"{key}={value}: expected an integer from 1.")
        return int(value)
    if default is None:  # a path
        return value
    return value.replace("\\n", "\n")  # so that a suffix with a line break can be typed in any shell


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]
    return "\n".join(lines)
