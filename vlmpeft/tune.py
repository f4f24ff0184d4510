"""Freeze everything, apply tuners, and keep hold of what they train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.errors import ModelError, nearest
from vlmpeft.parts import Parts, adapter_root, parts_by_name, parts_of, path_of
from vlmpeft.tuners.base import Tuner
from vlmpeft.tuners.full import Full
from vlmpeft.tuners.linear import AdaptedLinear, replace_module
from vlmpeft.tuners.lora import LoRA, LoRALinear
from vlmpeft.weights import assign, peft_key, plain_name, read_strict

ADAPTERS = "adapters"
TRAINED = "trained.safetensors"


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

        Raises: ModelError M552 if two tuners claim the same thing.
        """
        self.model.requires_grad_(False)
        for name, tuner in tuners.items():
            before = self.applied.get(name)
            if before is None or _structure(before.tuner) != _structure(tuner):
                self._refuse_conflict(name, tuner)
                before = Applied(name, tuner, tuner.apply(self.model, self.parts))
            self.applied[name] = Applied(name, tuner, before.parameters)
        self.active = set(tuners)
        for parameter in self.trainable().values():
            parameter.requires_grad_(True)

    def _refuse_conflict(self, name: str, tuner: Tuner) -> None:
        for other in self.applied.values():
            same_name = other.name == name
            if same_name or (isinstance(tuner, LoRA) and isinstance(other.tuner, LoRA) and tuner.part == other.tuner.part):
                raise ModelError(
                    "M552", f"tuner '{name}' ({tuner.kind} on {tuner.part}) meets '{other.name}' there.", "merge() or remove() the first, or use one of them."
                )

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains now, by name in the model; tied tensors once."""
        return {k: p for name in sorted(self.active) for k, p in self.applied[name].parameters.items()}

    def tuned_names(self) -> set[str]:
        """Every parameter tuned so far, trained now or in an earlier stage."""
        return {k for applied in self.applied.values() for k in applied.parameters}

    def save(self, directory: Path) -> set[str]:
        """Write every adapter and every other tuned tensor.

        Leaves `adapters/<name>/` in PEFT's format for adapters, `trained.safetensors` for the rest.
        Returns: names of the parameters written.
        """
        written: set[str] = set()
        rest: dict[str, Tensor] = {}
        for applied in self.applied.values():
            if isinstance(applied.tuner, LoRA):
                self._save_adapter(applied, applied.tuner, Path(directory) / ADAPTERS / applied.name)
            else:
                rest |= {plain_name(k): p for k, p in applied.parameters.items()}
            written |= set(applied.parameters)
        if rest:
            fs.write_tensors(Path(directory) / TRAINED, rest)
        return written

    def _save_adapter(self, applied: Applied, tuner: LoRA, directory: Path) -> None:
        prefix = self._root_prefix(tuner)
        tensors = {peft_key(k, prefix): p for k, p in applied.parameters.items()}
        targets = sorted({k.removeprefix(prefix).rsplit(".", 2)[0] for k in applied.parameters})
        base = str(getattr(getattr(self.parts.language, "config", None), "_name_or_path", "") or "")
        fs.write_tensors(directory / "adapter_model.safetensors", tensors)
        fs.write_json(directory / "adapter_config.json", tuner.peft_config(base, targets))

    def _root_prefix(self, tuner: LoRA) -> str:
        """Path, with its dot, of the module an adapter file is relative to."""
        root = adapter_root(self.model, self.parts) if tuner.part in ("language", "lm_head") else self.parts.get(tuner.part)
        path = path_of(self.model, root)
        return f"{path}." if path else ""

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, or a single PEFT adapter folder, strictly: all of it fits or nothing is applied.

        Raises: ModelError M502 (missing, extra or misshapen tensors), M503 (not finite).
        """
        directory = Path(directory)
        pending: list[tuple[Mapping[str, nn.Parameter], Mapping[str, Tensor]]] = []
        rest: dict[str, nn.Parameter] = {}
        for applied in self.applied.values():
            if isinstance(applied.tuner, LoRA):
                folder = directory / ADAPTERS / applied.name
                folder = folder if folder.is_dir() else directory
                prefix = self._root_prefix(applied.tuner)
                expected = {peft_key(k, prefix): p for k, p in applied.parameters.items()}
                pending.append((expected, read_strict(folder / "adapter_model.safetensors", expected)))
            else:
                rest |= {plain_name(k): p for k, p in applied.parameters.items()}
        if rest:
            pending.append((rest, read_strict(directory / TRAINED, rest)))
        for expected, found in pending:
            assign(expected, found)

    def _adapters(self) -> list[LoRALinear]:
        return [m for m in self.model.modules() if isinstance(m, LoRALinear)]

    def merge(self) -> None:
        """Fold the adapters into the weights they sit on; outputs stay, up to rounding."""
        for layer in self._adapters():
            layer.merge()

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        for layer in self._adapters():
            layer.unmerge()

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """The base without its adapters, inside a `with` block. Fully tuned parts stay as they are tuned."""
        layers = self._adapters()
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.enabled = True

    def remove(self) -> None:
        """Take the adapters out: the base layers stand again, bit for bit.

        Raises: ModelError M553 if a part was fully tuned: its old weights are nowhere but in the base checkpoint.
        """
        full = [a.name for a in self.applied.values() if isinstance(a.tuner, Full)]
        if full:
            raise ModelError("M553", f"'{full[0]}' tuned its part in place and cannot be removed.", "load the base again.")
        self.unmerge()
        for path, layer in [(n, m) for n, m in self.model.named_modules() if isinstance(m, AdaptedLinear)]:
            replace_module(self.model, path, layer.base_layer)
        self.applied, self.active = {}, set()
        self.model.requires_grad_(False)

    def table(self) -> list[dict[str, object]]:
        """Rows of the trainable table: part, tuners, trainable and total parameters, each tensor counted once."""
        part_of = parts_by_name(self.model, self.parts)
        names = {k: a.name for a in self.applied.values() if a.name in self.active for k in a.parameters}
        rows: dict[str, dict[str, object]] = {}
        for name, parameter in self.model.named_parameters():
            row = rows.setdefault(part_of[name], {"part": part_of[name], "tuners": set(), "trainable": 0, "total": 0})
            row["total"] = int(str(row["total"])) + parameter.numel()
            if parameter.requires_grad:
                row["trainable"] = int(str(row["trainable"])) + parameter.numel()
                row["tuners"] = {*list(row["tuners"]), names.get(name, "?")}  # type: ignore[call-overload]
        return [{**row, "tuners": sorted(row["tuners"])} for row in rows.values()]  # type: ignore[call-overload]


def _structure(tuner: Tuner) -> tuple[object, ...]:
    """What must agree for two tuners to mean the same parameters."""
    return (tuner.r, tuner.scale, tuner.targets, tuner.part) if isinstance(tuner, LoRA) else (tuner.kind, tuner.part)


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
            raise ModelError("M552", f"two tuners are called '{name}'{nearest(name, names)}", "name them: tune(model, {'a': ..., 'b': ...}).")
        names[name] = tuner
    return names
