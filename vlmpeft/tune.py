"""Freeze everything, apply tuners, and keep hold of what they train."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, parameter_table, parts_of, path_of
from vlmpeft.tuners.base import Tuner
from vlmpeft.tuners.full import Full
from vlmpeft.tuners.linear import AdaptedLinear, replace_module
from vlmpeft.tuners.lora import LoRA, LoRALinear
from vlmpeft.weights import assign, read_tuned, write_tuned


@dataclass(frozen=True)
class Applied:
    """A tuner and the parameters it trains, by their name in the model."""

    name: str
    tuner: Tuner
    parameters: Mapping[str, nn.Parameter]


class Tuned:
    """A model under tuning; see `tune`."""

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self.model, self.parts = model, parts
        self.applied: dict[str, Applied] = {}
        self.active: set[str] = set()  # names whose parameters train; the others stay as they are, and are saved too

    def apply(self, tuners: Mapping[str, Tuner]) -> None:
        """Train exactly what `tuners` say. One applied before under the same name goes on; others stay, frozen.

        Merged adapters are taken apart again. On an error the model is as it was.
        Raises: ModelError M552 if two tuners claim the same thing.
        """
        self.unmerge()
        applied, adapters = dict(self.applied), set(self._adapters())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        try:
            for name, tuner in tuners.items():
                self._add(name, tuner)
            self._rename()
            self.active = set(tuners)
            for parameter in self.trainable().values():
                parameter.requires_grad_(True)
        except Exception:
            self._take_out([layer for layer in self._adapters() if layer not in adapters])
            self.applied, self.active = applied, self.active & applied.keys()
            self.model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise

    def _add(self, name: str, tuner: Tuner) -> None:
        before = self.applied.get(name)
        if before is None or structure(before.tuner) != structure(tuner):
            refuse_conflict(name, tuner, {other.name: other.tuner for other in self.applied.values()})
            before = Applied(name, tuner, tuner.apply(self.model, self.parts))
        self.applied[name] = Applied(name, tuner, before.parameters)

    def _rename(self) -> None:
        """Give every parameter the name it has now: an adapter that wraps a layer changes the names inside."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for key, applied in self.applied.items():
            current = {names.get(id(p), name): p for name, p in applied.parameters.items()}
            self.applied[key] = Applied(applied.name, applied.tuner, current)

    def claims(self) -> dict[str, dict[str, nn.Parameter]]:
        """What each tuner trains now, every parameter once: of nested parts the innermost keeps it.

        Raises: ModelError M552 if two tuners of one part claim the same parameter.
        """
        depth = {name: -len(path_of(self.model, self.parts.get(self.applied[name].tuner.part))) for name in self.active}
        owner: dict[int, Applied] = {}
        for name in sorted(self.active, key=lambda n: (depth[n], n)):
            for key, parameter in self.applied[name].parameters.items():
                first = owner.setdefault(id(parameter), self.applied[name])
                if first.name != name and first.tuner.part == self.applied[name].tuner.part:
                    raise ModelError("M552", f"'{first.name}' and '{name}' both train {key}.", "use one of them.")
        return {
            name: {k: p for k, p in self.applied[name].parameters.items() if owner[id(p)].name == name}
            for name in sorted(self.active)
        }

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains now, by name in the model; tied tensors once."""
        return {k: p for parameters in self.claims().values() for k, p in parameters.items()}

    def tuned_names(self) -> set[str]:
        """Every parameter tuned so far, trained now or in an earlier stage."""
        return {k for applied in self.applied.values() for k in applied.parameters}

    def save(self, directory: Path) -> set[str]:
        """Write every adapter and every other tuned tensor.

        Leaves `adapters/<name>/` in PEFT's format, `projector.safetensors`, and `trained.safetensors` for the rest.
        Returns: names of the parameters written.
        """
        with self._unmerged():
            return write_tuned(self.applied.values(), self.model, self.parts, Path(directory))

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, or a single PEFT adapter folder, strictly: all of it fits or nothing is applied.

        Raises: ModelError M502 (missing, extra or misshapen tensors, another scale), M503 (not finite), M554.
        """
        with self._unmerged():
            for parameters, values in read_tuned(self.applied.values(), self.model, self.parts, Path(directory)):
                assign(parameters, values)

    def _adapters(self) -> list[LoRALinear]:
        return [m for m in self.model.modules() if isinstance(m, LoRALinear)]

    def merge(self) -> None:
        """Fold the adapters into the weights they sit on; outputs stay, up to rounding.

        Raises: ModelError M555 for an adapter on a tied weight: its twin would change too.
        """
        uses = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        for path, layer in self.model.named_modules():
            if isinstance(layer, LoRALinear) and uses[id(layer.base_layer.weight)] > 1:
                raise ModelError("M555", f"{path} shares its weight with another layer.", "keep its adapter unmerged.")
        for layer in self._adapters():
            layer.merge()

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        for layer in self._adapters():
            layer.unmerge()

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        """The adapters apart from their base inside a `with` block; merged again after it if they were."""
        merged = [layer for layer in self._adapters() if layer.merged_from is not None]
        for layer in merged:
            layer.unmerge()
        try:
            yield
        finally:
            for layer in merged:
                layer.merge()

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """The base without its adapters, merged or not, inside a `with` block. Fully tuned parts stay as they are."""
        with self._unmerged():
            enabled = [layer for layer in self._adapters() if layer.enabled]
            for layer in enabled:
                layer.enabled = False
            try:
                yield
            finally:
                for layer in enabled:
                    layer.enabled = True

    def remove(self) -> None:
        """Take the adapters out: the base layers stand again, bit for bit.

        Raises: ModelError M553 if a part was fully tuned: its old weights are nowhere but in the base checkpoint.
        """
        full = [a.name for a in self.applied.values() if isinstance(a.tuner, Full)]
        if full:
            message = f"'{full[0]}' tuned its part in place and cannot be removed."
            raise ModelError("M553", message, "load the base again.")
        self._take_out(self._adapters())
        self.applied, self.active = {}, set()
        self.model.requires_grad_(False)

    def _take_out(self, layers: Sequence[LoRALinear]) -> None:
        chosen = {id(layer) for layer in layers}
        for path, layer in [(n, m) for n, m in self.model.named_modules() if id(m) in chosen]:
            if isinstance(layer, LoRALinear):
                layer.unmerge()
                replace_module(self.model, path, layer.base_layer)

    def table(self) -> list[dict[str, object]]:
        """Rows of the trainable table: part, tuners, trainable and total parameters, each tensor counted once."""
        tuner_of = {key: name for name, parameters in self.claims().items() for key in parameters}
        adapters = [(path, m) for path, m in self.model.named_modules() if isinstance(m, AdaptedLinear)]
        inside = {
            f"{path}.{k}" for path, m in adapters for k, _ in m.named_parameters() if not k.startswith("base_layer.")
        }
        return parameter_table(self.model, self.parts, tuner_of, inside)


def refuse_conflict(name: str, tuner: Tuner, others: Mapping[str, Tuner]) -> None:
    """Raise ModelError M552 if a new tuner has the name of another, or is a second LoRA on the same part."""
    for other_name, other in others.items():
        both_lora = isinstance(tuner, LoRA) and isinstance(other, LoRA)
        if other_name == name or (both_lora and tuner.part == other.part):
            message = f"tuner '{name}' ({tuner.kind} on {tuner.part}) meets another '{other_name}' there."
            raise ModelError("M552", message, "use one of them, or the same settings (but lr) under the same name.")


def structure(tuner: Tuner) -> tuple[str, dict[str, object]]:
    """What must agree for two tuners to mean the same parameters used the same way: all but the learning rate."""
    values = {key: value for key, value in vars(tuner).items() if key != "lr"}
    return tuner.kind, values | ({"alpha": tuner.numerator} if isinstance(tuner, LoRA) else {})


def tune(model: nn.Module, tuners: Sequence[Tuner] | Mapping[str, Tuner], parts: Parts | None = None) -> Tuned:
    """Freeze `model` and train exactly what `tuners` say, in place.

    Args:
        model: one of ours, a Hugging Face VLM, or any module described by `parts`.
        tuners: a sequence (each named after its kind, or its part where that is taken) or named tuners.
        parts: anatomy of the model; found by `parts_of` if None.

    Raises: ModelError M530-M532, M550-M552.
    """
    named = dict(tuners) if isinstance(tuners, Mapping) else _named(tuners)
    tuned = Tuned(model, parts or parts_of(model))
    tuned.apply(named)
    return tuned


def _named(tuners: Sequence[Tuner]) -> dict[str, Tuner]:
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
