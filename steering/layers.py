"""Which decoder blocks are steered, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlmpeft.errors import ConfigError

NAMES = "all, every:K, shallow, middle, deep or a list of block numbers"


def parse_layers(value: str | Sequence[int], count: int) -> list[int]:
    """Block numbers, from 0. shallow, middle, deep: a third of the blocks each, the middle one takes what is over.

    Raises: ConfigError C102 for an unknown name, or a block that is not there.
    """
    if not isinstance(value, str):
        wrong = [n for n in value if not -count <= n < count]
        if wrong or not value:
            raise ConfigError("C102", f"layers={list(value)}: the model has {count} blocks.", f"use 0 to {count - 1}.")
        return sorted({n % count for n in value})
    third = count // 3
    named = {
        "all": range(count),
        "shallow": range(third or 1),
        "middle": range(third, count - third),
        "deep": range(count - (third or 1), count),
    }
    if value in named:
        return list(named[value])
    if match := re.fullmatch(r"every:([1-9]\d*)", value):
        return list(range(0, count, int(match[1])))
    raise ConfigError("C102", f"layers='{value}' names no blocks.", f"use {NAMES}.")
