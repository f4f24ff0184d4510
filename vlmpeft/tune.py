"""Freeze everything, apply tuners, and keep hold of what they train."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vlmpeft.conflicts import apply_named, named_after_parts, refuse_conflict, refuse_hidden, structure
from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, parameter_table, parts_of, path_of
from vlmpeft.quant_weight import is_quantised, refuse_training
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import Tuner, with_notes
from vlmpeft.tuners.linear import AdaptedLinear
from vlmpeft.weights import assign, plain_name, read_tuned, write_tuned


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
            self.rename()
            self.active = set(tuners)
            refuse_training(self.model, self.trainable())
            refuse_hidden(self.model, self.trainable())
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
            before = Applied(name, tuner, apply_named(name, tuner, self.model, self.parts))
        self.applied[name] = Applied(name, tuner, before.parameters)

    def rename(self) -> None:
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

    def plain_state(self) -> dict[str, Tensor]:
        """Every tensor of the model, buffers included, under the name it has without adapters; theirs are left out."""
        added = self._added()
        return {plain_name(k): v for k, v in self.model.state_dict().items() if k not in added}

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

    def _adapters(self) -> list[Attachment]:
        """Outermost first: of those on one layer the inner must be merged first, and unmerged last."""
        return [m for m in self.model.modules() if isinstance(m, Attachment)]

    def _added(self) -> set[str]:
        """Names of the parameters that adapters brought."""
        found = [(path, m) for path, m in self.model.named_modules() if isinstance(m, Attachment)]
        return {f"{path}.{name}" for path, m in found for name in m.own_parameters()}

    def merge(self) -> None:
        """Fold the adapters into the weights they sit on; outputs stay, up to rounding.

        Raises: ModelError M555 for an adapter on a tied weight, whose twin would change too; M556 for one that has no
            form as weights; M557 for one on a quantised weight.
        """
        self._refuse_merge()
        for layer in reversed(self._adapters()):
            layer.merge()

    def _refuse_merge(self) -> None:
        uses = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        for path, layer in self.model.named_modules():
            if isinstance(layer, Attachment) and layer.unmergeable:
                reason = f"{path} ({type(layer).__name__}) cannot be merged: {layer.unmergeable}."
                if isinstance(layer, AdaptedLinear) and is_quantised(layer):
                    into = "python -m vlmpeft.merge model=DIR out=DIR merges into the original weights."
                    raise ModelError("M557", reason, into)
                raise ModelError("M556", reason, "keep it beside the base, or remove() it first.")
            if isinstance(layer, AdaptedLinear) and uses[id(layer.base_layer.weight)] > 1:
                raise ModelError("M555", f"{path} shares its weight with another layer.", "keep its adapter unmerged.")

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        for layer in self._adapters():
            layer.unmerge()

    def merge_and_unload(self) -> None:
        """Fold the adapters in for good and take them out: the model is a plain one, and nothing trains.

        Layer by layer, so that no second copy of the weights is held. Fully tuned parts stay known, and are saved.
        Raises: ModelError M555-M557 as `merge`.
        """
        self._refuse_merge()
        added = self._added()
        for layer in reversed(self._adapters()):
            layer.settle()
        self._take_out(self._adapters())
        self.applied = {name: a for name, a in self.applied.items() if not added.issuperset(a.parameters)}
        self.rename()
        self.active = set()
        self.model.requires_grad_(False)

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        """The adapters apart from their base inside a `with` block; merged again after it if they were."""
        merged = [layer for layer in self._adapters() if layer.merged]
        for layer in merged:
            layer.unmerge()
        try:
            yield
        finally:
            for layer in reversed(merged):
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

        Raises: ModelError M553 if a part was tuned in place: its old weights are nowhere but in the base checkpoint.
        """
        added = self._added()
        in_place = [a.name for a in self.applied.values() if not added.issuperset(a.parameters)]
        if in_place:
            message = f"'{in_place[0]}' tuned its part in place and cannot be removed."
            raise ModelError("M553", message, "load the base again.")
        self._take_out(self._adapters())
        self.applied, self.active = {}, set()
        self.model.requires_grad_(False)

    def _take_out(self, layers: Sequence[Attachment]) -> None:
        chosen = {id(layer) for layer in layers}
        for layer in layers:
            layer.unmerge()
        for path, module in reversed(list(self.model.named_modules())):
            if isinstance(module, Attachment) and id(module) in chosen:
                module.take_out(self.model, path)

    def table(self) -> list[dict[str, object]]:
        """Rows of the trainable table: part, tuners, trainable and total parameters (each tensor once), note."""
        tuner_of = {key: name for name, parameters in self.claims().items() for key in parameters}
        rows = parameter_table(self.model, self.parts, tuner_of, self._added())
        return with_notes(rows, {name: (a.tuner, a.parameters) for name, a in self.applied.items()})


def tune(model: nn.Module, tuners: Sequence[Tuner] | Mapping[str, Tuner], parts: Parts | None = None) -> Tuned:
    """Freeze `model` and train exactly what `tuners` say, in place.

    Args:
        model: one of ours, a Hugging Face VLM, or any module described by `parts`.
        tuners: a sequence (each named after its kind, or its part where that is taken) or named tuners.
        parts: anatomy of the model; found by `parts_of` if None.

    Raises: ModelError M530-M532, M550-M552.
    """
    named = dict(tuners) if isinstance(tuners, Mapping) else named_after_parts(tuners)
    tuned = Tuned(model, parts or parts_of(model))
    tuned.apply(named)
    return tuned
