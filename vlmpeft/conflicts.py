"""When two tuners are the same, when they are in each other's way, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from vlmpeft.errors import ModelError, VlmpeftError
from vlmpeft.parts import Parts
from vlmpeft.tuners.base import Tuner
from vlmpeft.tuners.full import Full
from vlmpeft.tuners.linear import AdaptedLinear, chain
from vlmpeft.tuners.substitute import Substitute


@runtime_checkable
class HasDefaults(Protocol):
    """A tuner whose defaults depend on its other fields."""

    def resolved(self) -> Tuner: ...


def structure(tuner: Tuner) -> tuple[str, dict[str, object]]:
    """What must agree for two tuners to mean the same parameters used the same way: all but the learning rate."""
    plain = tuner.resolved() if isinstance(tuner, HasDefaults) else tuner
    return tuner.kind, {key: value for key, value in vars(plain).items() if key != "lr"}


def refuse_conflict(name: str, tuner: Tuner, others: Mapping[str, Tuner]) -> None:
    """Raise ModelError M552 if a new tuner has the name of another, or is a second adapter of its kind on its part."""
    for other_name, other in others.items():
        same = (tuner.kind, tuner.part) == (other.kind, other.part) and not isinstance(tuner, Full)
        if other_name == name or same:
            message = f"tuner '{name}' ({tuner.kind} on {tuner.part}) meets another '{other_name}' there."
            raise ModelError("M552", message, "use one of them, or the same settings (but lr) under the same name.")


def refuse_hidden(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """Raise ModelError M552 if what trains has no effect, as another tuner's tensor stands for it, or as
    `refuse_covered`."""
    substitutes = [m for m in model.modules() if isinstance(m, Substitute)]
    replaced = {id(p) for one in substitutes for p in one.replaced().values()}
    for name, parameter in trained.items():
        if id(parameter) in replaced:
            raise ModelError("M552", f"{name} would train, but another tuner stands for it.", "use one of the two.")
    refuse_covered(model)


def refuse_covered(model: nn.Module) -> None:
    """Raise ModelError M552 if an adapter that reads the weight of its layer has one below it that changes it."""
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear) and layer.reads_weight:
            changing = [type(below).__name__ for below in list(chain(layer))[1:] if _changes_weight(below)]
            if changing:
                plain = path.replace(".base_layer", "")
                message = f"{plain}: {type(layer).__name__} reads the weight, which {changing[0]} below it changes."
                raise ModelError("M552", message, "use one of the two tuners, or name the first before the other.")


def _changes_weight(layer: nn.Module) -> bool:
    """Whether a layer gives another output than its weight says. In a pool no row has two adapters."""
    if isinstance(layer, AdaptedLinear):
        return layer.slot is None
    return isinstance(layer, Substitute) and "weight" in layer.names


def apply_named(name: str, tuner: Tuner, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
    """Apply a tuner. Returns: what it trains. Raises: as the tuner, with its name before the message."""
    try:
        return tuner.apply(model, parts)
    except VlmpeftError as error:
        raise type(error)(error.code, f"tuner '{name}': {error.message}", error.fix) from error


def named_after_parts(tuners: Sequence[Tuner]) -> dict[str, Tuner]:
    """Name tuners after their kind, full tuning after its part; where that is taken, after both.

    Raises: ModelError M552 if two names are equal nevertheless.
    """
    names: dict[str, Tuner] = {}
    for tuner in tuners:
        name = tuner.part if isinstance(tuner, Full) else tuner.kind
        if name in names:
            name = f"{tuner.kind}_{tuner.part}"
        if name in names:
            raise ModelError(
                "M552", f"two tuners are called '{name}'.", "name them: tune(model, {'a': ..., 'b': ...})."
            )
        names[name] = tuner
    return names
