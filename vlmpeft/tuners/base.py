"""What a tuner is: a frozen dataclass whose fields are its recipe section, applied to a model through its `Parts`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from vlmpeft.errors import ConfigError, nearest
from vlmpeft.parts import PARTS, Parts
from vlmpeft.registry import Registry
from vlmpeft.tuners.attachment import Attachment


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


@runtime_checkable
class PeftTensors(Protocol):
    """A `PeftForm` whose file holds other tensors than its layers do. Names are those of `Tuned.trainable`."""

    def to_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


@runtime_checkable
class FillsOut(Protocol):
    """A `PeftForm` whose folder may hold less than the layers do."""

    def fill_out(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a folder's file in the shapes that the layers have. Names are the file's."""
        ...


@runtime_checkable
class HasLrFactors(Protocol):
    """A tuner some of whose parameters learn faster or slower than its learning rate says."""

    def lr_factors(self, names: Iterable[str]) -> Mapping[str, float]:
        """Factors by name; 1 for a name that is left out."""
        ...


@runtime_checkable
class DoesNotDecay(Protocol):
    """A tuner whose parameters do not start around zero: weight decay would pull them from where they belong.

    decays: says so in the tuner's file.
    """

    decays: ClassVar[bool]


@runtime_checkable
class BeforeStep(Protocol):
    """A tuner that changes what trains as training goes on, in one process; `vlmpeft.steps.Steps` calls it."""

    def before_step(self, parts: Parts, step: int) -> None:
        """Set `requires_grad` of what it trains. Args: step: optimizer steps of the stage done so far."""
        ...


@runtime_checkable
class Penalised(Protocol):
    """A tuner with a penalty of its own beside the loss, whose gradient it knows; `vlmpeft.steps.Steps` calls it."""

    def add_gradients(self, layers: Mapping[str, Attachment]) -> Tensor:
        """Add it to the gradients of its layers, by path. Returns: the penalty, a scalar."""
        ...


@runtime_checkable
class AfterStep(Protocol):
    """A tuner that acts on its layers once an optimizer step is done; `vlmpeft.steps.Steps` calls it.

    What it must remember from step to step is a state by name, as an optimizer's: kept for it, and saved.
    """

    def start_state(self, layers: Mapping[str, Attachment]) -> dict[str, Tensor]:
        """The state before the first step. Args: layers: what it has put into the model, by path."""
        ...

    def after_step(
        self, layers: Mapping[str, Attachment], state: dict[str, Tensor], step: int, total: int
    ) -> Mapping[str, float]:
        """Act, with the step's gradients still there, and bring the state up to date.

        Args: step: from 0; total: optimizer steps of the stage. Returns: numbers for the log.
        """
        ...


@runtime_checkable
class ReadsOriginals(Protocol):
    """A tuner that may need the weights a quantised base had before."""

    @property
    def needs_originals(self) -> bool: ...
    def on_whole_weights(self) -> Tuner:
        """The same update for a base that is not quantised."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A tuner that must see samples before it trains.

    samples: how many it wants.
    """

    @property
    def samples(self) -> int: ...

    def is_calibrated(self, model: nn.Module, parts: Parts) -> bool:
        """Whether it has seen them, now or before it was saved."""
        ...

    def calibrate(self, model: nn.Module, parts: Parts, losses: Iterable[Tensor]) -> None:
        """See them. Args: losses: summed over the tokens of one sample each, computed as they are taken."""
        ...


@runtime_checkable
class CountedTwice(Protocol):
    """A tuner whose paper counts less than what it trains."""

    def count_note(self, parameters: Mapping[str, nn.Parameter]) -> str:
        """The paper's count in words, "" for none. Args: parameters: what it trains, by name."""
        ...


def with_notes(
    rows: list[dict[str, object]], tuners: Mapping[str, tuple[Tuner, Mapping[str, nn.Parameter]]]
) -> list[dict[str, object]]:
    """Rows of a trainable table with a "note" where a tuner of the row counts in two ways.

    Args: tuners: tuner and what it trains, by its name in the rows.
    """
    for row in rows:
        chosen = [tuners[name] for name in row["tuners"] if name in tuners]  # type: ignore[attr-defined]
        notes = [t.count_note(parameters) for t, parameters in chosen if isinstance(t, CountedTwice)]
        if any(notes):
            row["note"] = "; ".join(note for note in notes if note)
    return rows


def peft_form(tuner: object) -> PeftForm | None:
    """The tuner, if its folder is one that `peft` loads."""
    return tuner if isinstance(tuner, PeftForm) and tuner.in_peft else None


TUNERS: Registry[Tuner] = Registry("tuner")


def check_part(part: str, key: str) -> None:
    """Raise ConfigError C102 unless `part` is the name of one."""
    if part not in PARTS:
        message = f"{key}={part!r} is no part{nearest(part, PARTS)}."
        raise ConfigError("C102", message, f"write {key}= with one of them.")


def check(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise ConfigError C102 unless `condition` holds: what every tuner's `__post_init__` calls."""
    if not condition:
        raise ConfigError("C102", f"{key}={value!r} is out of range.", f"use {allowed}.")
