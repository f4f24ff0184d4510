"""Many adapters on one base: named, switched at run time, and mixed row by row in one batch. Letters: b rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import nn

from vlmpeft.adapter_files import adapter_folder
from vlmpeft.conflicts import refuse_covered
from vlmpeft.errors import ModelError, nearest
from vlmpeft.routed import route
from vlmpeft.routing import rows_with
from vlmpeft.tune import Applied, Tuned
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import Tuner
from vlmpeft.tuners.bottleneck import BottleneckAdapter
from vlmpeft.tuners.bottleneck_layers import Bottleneck
from vlmpeft.tuners.linear import AdaptedLinear, LinearTuner, Slot
from vlmpeft.tuners.lora import lora_from_peft
from vlmpeft.weights import PROJECTOR, assign, read_tuned, write_tuned

BASE = -1  # in `Routing.adapter`: a row that uses none


@dataclass(frozen=True)
class Member:
    """An adapter of a pool: its tuner, its layers with the place they share, and what of it can be trained."""

    tuner: Tuner
    slot: Slot
    layers: Sequence[AdaptedLinear | Bottleneck]
    parameters: Sequence[nn.Parameter]

    @property
    def enabled(self) -> bool:
        """Whether it may act."""
        return self.layers[0].enabled


class AdapterPool:
    """Adapters of any ranks and kinds on the layers of one language model's blocks, frozen until `train` names them.

    A layer computes its base once for the whole batch, then each adapter for its own rows: no rank is padded. What the
    tuners of `tuned` train (a projector, say) is beneath the pool and stays.

    Args: tuned: a model from `vlmpeft.tune` or `Bundle.tuned`.
    """

    def __init__(self, tuned: Tuned) -> None:
        self.tuned, self.members = tuned, dict[str, Member]()
        self._numbers = count()

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they came."""
        return list(self.members)

    @property
    def active(self) -> str | None:
        """The adapter of forwards outside of `rows`; None for the base."""
        return next((name for name, member in self.members.items() if member.slot.active), None)

    def add(self, name: str, source: Tuner | str | Path) -> None:
        """Put an adapter beside the others; it acts once it is activated or rows name it.

        Args: source: a tuner, for a new adapter; or a directory with a LoRA: a PEFT folder, or a model directory.
        Raises: ModelError M590 for a name that is taken, M591 for a tuner that cannot share its layers, M552 if `tuned`
            has an adapter of the kind there, and as `load`. On an error the model is as it was.
        """
        if name in self.members:
            raise ModelError("M590", f"the pool has an adapter '{name}'.", "delete it first, or use another name.")
        if not isinstance(source, str | Path):
            self.members[name] = self._attach(source)
            return
        self.members[name] = self._attach(lora_from_peft(adapter_folder(Path(source))))
        try:
            self.load(name, source)
        except ModelError:
            self.delete(name)
            raise

    def _attach(self, tuner: Tuner) -> Member:
        """Apply a tuner. Raises: as the tuner; ModelError M591 unless it adapts linear layers or is a bottleneck."""
        if not isinstance(tuner, LinearTuner | BottleneckAdapter) or tuner.part != "language":
            message = f"{tuner.kind} on {tuner.part} is no adapter on layers of the language model's blocks."
            raise ModelError("M591", message, "rows cannot choose it; apply it with vlmpeft.tune.")
        before = set(self._attachments())
        slot = Slot(next(self._numbers))
        try:
            trained = tuner.apply(self.tuned.model, self.tuned.parts)
            added = [m for m in self._attachments() if m not in before]
            layers = [m for m in added if isinstance(m, AdaptedLinear | Bottleneck)]
            if len(layers) < len(added) or not layers:
                raise ModelError("M591", f"a {tuner.kind} is more than adapters on layers.", "use vlmpeft.tune.")
            refuse_covered(self.tuned.model)
        except Exception:
            self._take_out(set(self._attachments()) - before)
            raise
        for layer in layers:
            layer.slot = slot
            for parameter in layer.own_parameters().values():
                parameter.requires_grad_(False)
        self.tuned.rename()
        return Member(tuner, slot, layers, list(trained.values()))

    def _attachments(self) -> list[Attachment]:
        return [m for m in self.tuned.model.modules() if isinstance(m, Attachment)]

    def _take_out(self, layers: set[Attachment]) -> None:
        for path, module in reversed(list(self.tuned.model.named_modules())):
            if isinstance(module, Attachment) and module in layers:
                module.take_out(self.tuned.model, path)
        self.tuned.rename()

    def delete(self, name: str) -> None:
        """Take an adapter out; the base's layers, and the other adapters, are as they were, bit for bit."""
        member = self._member(name)
        self._take_out(set(member.layers))
        del self.members[name]

    def activate(self, name: str | None) -> None:
        """Make one adapter act on whole batches, and no other; None leaves the base."""
        chosen = None if name is None else self._usable(name)
        for member in self.members.values():
            member.slot.active = member is chosen

    def disable(self, name: str) -> None:
        """Switch an adapter off: it acts no more, and no row may name it until `enable`."""
        member = self._member(name)
        member.slot.active = False
        for layer in member.layers:
            layer.enabled = False

    def enable(self, name: str) -> None:
        """Let a disabled adapter be used again."""
        for layer in self._member(name).layers:
            layer.enabled = True

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Give every row of the batches inside a `with` block an adapter of its own, by name; None for the base.

        Backward may come after the block. Raises: ModelError M590 for a name that is not there, or disabled; in the
        model, M592 for a batch of another size.
        """
        chosen = [BASE if name is None else self._usable(name).slot.index for name in names]
        routed = route(self.tuned.model, self.tuned.parts)
        try:
            with rows_with(torch.tensor(chosen)):
                yield
        finally:
            routed.release()

    def train(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Make exactly these adapters of the pool trainable. Returns: their parameters by name in the model."""
        chosen = [self._member(name) for name in names]
        for member in self.members.values():
            for parameter in member.parameters:
                parameter.requires_grad_(member in chosen)
        return {k: p for name in names for k, p in self.parameters(name).items()}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """What of an adapter can be trained, by its name in the model now."""
        names = {id(p): key for key, p in self.tuned.model.named_parameters()}
        return {names[id(p)]: p for p in self._member(name).parameters}

    def save(self, name: str, directory: str | Path) -> None:
        """Write one adapter as `Tuned.save` does: `adapters/<name>/` for `peft`, or else `trained.safetensors`."""
        write_tuned([self._applied(name)], self.tuned.model, self.tuned.parts, Path(directory))

    def load(self, name: str, directory: str | Path) -> None:
        """Read the weights of an adapter, strictly. Raises: ModelError M502, M503, M554 as `Tuned.load`; M581."""
        folder = adapter_folder(Path(directory))
        if (folder / PROJECTOR).exists():
            message = f"{folder} holds a projector, which the adapters of a pool share."
            raise ModelError("M581", message, "load that model with vlmpeft.load and add its adapter by itself.")
        for tensors, values in read_tuned([self._applied(name)], self.tuned.model, self.tuned.parts, folder):
            assign(tensors, values)

    def _applied(self, name: str) -> Applied:
        return Applied(name, self._member(name).tuner, self.parameters(name))

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise ModelError("M590", f"the pool has no adapter '{name}'{nearest(name, self.members)}")
        return self.members[name]

    def _usable(self, name: str) -> Member:
        member = self._member(name)
        if not member.enabled:
            raise ModelError("M590", f"adapter '{name}' is disabled.", "enable() it first.")
        return member
