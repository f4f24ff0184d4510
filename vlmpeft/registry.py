"""Names for the parts a recipe can choose: a dictionary that suggests the nearest name and shows its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from vlmpeft.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to a factory. Positional parameters come from the model, keyword-only ones are the user's options.

    Args:
        kind: what is registered, as it reads in messages ("projector", "tuner").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that adds a factory under `name`. Raises: ConfigError C120 if the name is taken by another."""

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            if name in self._factories and self._factories[name] is not factory:
                raise ConfigError("C120", f"{self.kind} '{name}' is already registered.", "choose another name.")
            self._factories[name] = factory
            return factory

        return add

    def get(self, name: str) -> Callable[..., T]:
        """The factory called `name`. Raises: ConfigError C103 with the nearest name."""
        if name not in self._factories:
            raise ConfigError("C103", f"no {self.kind} '{name}'{nearest(name, self._factories)}")
        return self._factories[name]

    def options(self, name: str) -> Mapping[str, inspect.Parameter]:
        """The keyword-only parameters of `name`: what a recipe section may set."""
        parameters = inspect.signature(self.get(name)).parameters
        return {k: p for k, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def build(self, name: str, *args: Any, **options: Any) -> T:
        """Call the factory. Raises: ConfigError C104 for an option it does not have."""
        known = self.options(name)
        for key in options:
            if key not in known:
                raise ConfigError("C104", f"{self.kind} '{name}' has no option '{key}'{nearest(key, known)}")
        return self.get(name)(*args, **options)

    def __contains__(self, name: object) -> bool:
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))
