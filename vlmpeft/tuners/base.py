"""What a tuner is: a frozen dataclass whose fields are its recipe section, applied to a model through its `Parts`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from vlmpeft.errors import ConfigError
from vlmpeft.parts import PARTS, Parts
from vlmpeft.registry import Registry


class Tuner(Protocol):
    """A method of tuning.

    kind: its name in recipes. part: the part it works on. lr: its learning rate, None for the recipe's `optim.lr`.
    """

    kind: ClassVar[str]

    @property
    def part(self) -> str: ...
    @property
    def lr(self) -> float | None: ...

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Change the model in place. Returns: what is to be trained, by its name in `model`, in fp32."""
        ...


@runtime_checkable
class PeftForm(Protocol):
    """A tuner that `peft` has too: its tensors, under peft's names, go into a folder that `peft` loads."""

    kind: ClassVar[str]

    @property
    def part(self) -> str: ...
    @property
    def in_peft(self) -> bool:
        """Whether these very settings exist in peft."""
        ...

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """adapter_config.json. Args: targets: paths of the adapted modules, relative to the adapter's root."""
        ...

    def check_peft(self, folder: Path) -> None:
        """Raise ModelError M502 or M554 unless a folder's adapter_config.json means this tuner."""
        ...


def peft_form(tuner: object) -> PeftForm | None:
    """The tuner, if its folder is one that `peft` loads."""
    return tuner if isinstance(tuner, PeftForm) and tuner.in_peft else None


TUNERS: Registry[Tuner] = Registry("tuner")


def check_part(part: str, key: str) -> None:
    """Raise ConfigError C102 unless `part` is the name of one."""
    check(part in PARTS, key, part, "one of " + ", ".join(PARTS))


def check(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise ConfigError C102 unless `condition` holds: what every tuner's `__post_init__` calls."""
    if not condition:
        raise ConfigError("C102", f"{key}={value!r} is out of range.", f"use {allowed}.")
