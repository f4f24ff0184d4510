"""Some blocks of a language model in a word."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlmpeft.tuners.base import check

Choice = str | tuple[int, ...]
EVERY = "all"
FORMS = r"all|(first|last|every):[1-9]\d*|first_last:[1-9]\d*,[1-9]\d*|\d+-\d+"
ALLOWED = "all, first:N, last:N, first_last:N,M, every:K, N-M or a list of block numbers"


def check_choice(choice: Choice, key: str) -> None:
    """Raise ConfigError C102 unless `choice` is one: see `which_blocks`."""
    check(bool(re.fullmatch(FORMS, choice) if isinstance(choice, str) else choice), key, choice, ALLOWED)


def which_blocks(choice: Choice, count: int, key: str) -> list[int]:
    """Block numbers of `count`, ascending.

    Args:
        choice: "all", "first:N", "last:N", "first_last:N,M", "every:K" (blocks 0, K, 2K, ...), "N-M" with both ends, or
            a list of numbers, negative ones from the end.
        key: the option that holds it, for messages.

    Raises: ConfigError C102 for blocks that are not there.
    """
    numbers = _numbers(choice, count)
    present = bool(numbers) and all(0 <= n < count for n in numbers)
    check(present, key, choice, f"blocks 0 to {count - 1}, which the model has")
    return sorted(set(numbers))


def _numbers(choice: Choice, count: int) -> Sequence[int]:
    if not isinstance(choice, str):
        return [n + count if n < 0 else n for n in choice]
    if choice == EVERY:
        return range(count)
    if "-" in choice:
        first, last = (int(n) for n in choice.split("-"))
        return range(first, last + 1)
    form, _, values = choice.partition(":")
    first, last = ([int(n) for n in values.split(",")] * 2)[:2]
    if form == "first":
        return range(first)
    if form == "last":
        return range(count - last, count)
    if form == "every":
        return range(0, count, first)
    return [*range(first), *range(count - last, count)]
