"""The registry of names."""

from __future__ import annotations

import pytest

from vlmpeft.errors import ConfigError
from vlmpeft.registry import Registry


@pytest.fixture
def registry() -> Registry[tuple[object, ...]]:
    made: Registry[tuple[object, ...]] = Registry("projector")

    @made.register("linear")
    def linear(width: int, *, depth: int = 1, dropout: float = 0.0) -> tuple[object, ...]:
        return width, depth, dropout

    @made.register("other")
    class Other(tuple):
        def __new__(cls, width: int, *, gain: float = 1.0) -> Other:
            return super().__new__(cls, (width, gain))

    return made


def test_builds_by_name_from_positional_arguments_and_options(registry: Registry) -> None:
    assert registry.build("linear", 3, depth=2) == (3, 2, 0.0)
    assert registry.build("other", 4, gain=2.0) == (4, 2.0)
    assert sorted(registry.options("linear")) == ["depth", "dropout"]


def test_lists_names_in_order(registry: Registry) -> None:
    assert list(registry) == ["linear", "other"]
    assert "linear" in registry
    assert "lin" not in registry


def test_an_unknown_name_suggests_the_nearest(registry: Registry) -> None:
    with pytest.raises(
        ConfigError, match=r"C103.*no projector 'liner'; did you mean 'linear'\? \(known: linear, other\)"
    ):
        registry.get("liner")


def test_an_unknown_option_suggests_the_nearest(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"C104.*no option 'dept'; did you mean 'depth'\?"):
        registry.build("linear", 3, dept=2)
    with pytest.raises(ConfigError, match="C104"):
        registry.build("linear", width=3)  # comes from the model, not from a recipe


def test_a_name_is_taken_once_but_the_same_thing_may_register_again(registry: Registry) -> None:
    registry.register("linear")(registry.get("linear"))
    with pytest.raises(ConfigError, match="C120"):
        registry.register("linear")(lambda width: (width,))
    assert registry.build("linear", 1) == (1, 1, 0.0)
