"""Mappings to dataclasses: what is taken, what is refused, and with which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from vlmpeft.errors import ConfigError
from vlmpeft.schema import as_plain, build, convert


@dataclass(frozen=True)
class Section:
    name: str
    rate: float = 1e-3
    steps: int | None = None
    flag: bool = False
    mode: Literal["pad", "square"] = "pad"
    betas: tuple[float, float] = (0.9, 0.999)
    names: tuple[str, ...] = ()
    targets: str | tuple[str, ...] = "all"
    options: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3), (int, 3.0, 3), (int, "3", 3), (int, "1e2", 100), (int, 9007199254740993, 9007199254740993),
        (int, "9007199254740993", 9007199254740993), (float, 3, 3.0), (float, "1e-4", 1e-4), (float, 1e-4, 1e-4),
        (str, "a", "a"), (str, 7, "7"), (bool, True, True), (bool, False, False), (int | None, None, None),
        (tuple[float, float], [1, "2"], (1.0, 2.0)), (tuple[str, ...], [], ()), (str | tuple[str, ...], "a", "a"),
        (str | tuple[str, ...], ["a", "b"], ("a", "b")), (dict[str, Any], {"a": 1}, {"a": 1}), (Any, [1], [1]),
        (Mapping, {"a": 1}, {"a": 1}), (Literal["pad", "square"], "pad", "pad"),
    ],
)  # fmt: skip
def test_values_are_brought_into_their_form(hint: Any, value: object, expected: object) -> None:
    found = convert(value, hint, "key")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, "abc"), (int, 1.5), (int, True), (int, None), (int, "1.5"), (int, float("inf")), (int, float("nan")),
        (int, [1]), (float, "abc"), (float, True), (float, float("nan")), (float, float("inf")), (float, "nan"),
        (float, "-inf"), (float, 10**400), (float, "1e999"), (str, True), (str, None), (str, ["a"]), (bool, 1),
        (bool, "true"), (bool, None), (tuple[float, float], [1.0]), (tuple[float, float], "ab"),
        (tuple[float, float], [1, "x"]), (tuple[str, ...], "ab"), (tuple[str, ...], 5), (dict[str, Any], [1]),
        (Literal["pad", "square"], "pat"), (Literal["pad", "square"], ["pad"]), (str | tuple[str, ...], {"a": 1}),
        (int | None, "null"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused_by_name(hint: Any, value: object) -> None:
    with pytest.raises(ConfigError, match=r"C102.*section\.key") as caught:
        convert(value, hint, "section.key")
    assert caught.value.fix.startswith("write section.key=")


def test_a_section_keeps_its_defaults() -> None:
    assert build(Section, {"name": "x", "rate": "2e-5"}, "s") == Section("x", rate=2e-5)


@pytest.mark.parametrize(
    ("values", "where", "message"),
    [
        ({"name": "x", "rat": 1}, "optim", "[C101] optim: no key 'rat'; did you mean 'rate'?"),
        ({"name": "x", "rat": 1}, "", "[C101] recipe: no key 'rat'; did you mean 'rate'?"),
        ({}, "vision", "[C106] vision.name is not set. Fix: write vision.name=VALUE."),
        ({"name": None}, "", "[C106] name is not set. Fix: write name=VALUE."),
        ({"name": "x", "steps": "many"}, "optim", "[C102] optim.steps='many' is not an integer."),
        ({"name": "x", "mode": "pat"}, "", "[C102] mode='pat' is not one of pad, square. Fix: write mode="),
        (5, "optim", "[C102] optim=5 is not a section. Fix: write optim.key=value."),
        ([], "optim", "[C102] optim=[] is not a section."),
    ],
)
def test_messages_name_the_key_as_it_is_written(values: object, where: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Section, values, where)
    assert str(caught.value).startswith(message)


def test_a_plain_form_builds_the_same_section_again() -> None:
    section = Section("x", steps=3, names=("a",), targets=("q", "v"), options={"deep": {"list": [1, (2, 3)]}})
    plain = as_plain(section)
    assert plain["names"] == ["a"]
    assert plain["options"] == {"deep": {"list": [1, [2, 3]]}}
    assert build(Section, {**plain, "options": {}}, "s") == Section("x", steps=3, names=("a",), targets=("q", "v"))
