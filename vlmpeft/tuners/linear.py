"""What the adapters on linear layers share. Letters: b batch, s sequence, d_in d_out widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.quant_weight import is_quantised
from vlmpeft.routed import RoutedModel, current_routing, find_routing, route, routed
from vlmpeft.routing import Routing
from vlmpeft.tuners.attachment import Attachment, WeightUpdate
from vlmpeft.tuners.base import check, check_part
from vlmpeft.tuners.block_choice import EVERY, Choice, check_choice
from vlmpeft.tuners.targets import check_targets, find_linears, is_linear, replace_module

Where = Literal["all", "visual", "text", "answer"]


class GatedTuner(Protocol):
    """What a tuner says of the tokens it acts on."""

    kind: ClassVar[str]

    @property
    def part(self) -> str: ...
    @property
    def where(self) -> Where: ...


@runtime_checkable
class LinearTuner(GatedTuner, Protocol):
    """What a tuner of linear layers says of them."""

    @property
    def targets(self) -> str | tuple[str, ...]: ...
    @property
    def layers(self) -> Choice: ...


def check_where(tuner: GatedTuner) -> None:
    """Raise ConfigError C102 unless the tuner's part is known, and has image and text tokens if it picks among them."""
    check_part(tuner.part, f"{tuner.kind}.part")
    check(tuner.where in get_args(Where), f"{tuner.kind}.where", tuner.where, "one of " + ", ".join(get_args(Where)))
    alone = tuner.where == "all" or tuner.part == "language"
    check(alone, f"{tuner.kind}.where", tuner.where, "all: only the language model sees image and text tokens")


def check_linear(tuner: LinearTuner) -> None:
    """`check_where`, and raise ConfigError C102 for targets or layers that no model can have."""
    check_where(tuner)
    check_targets(tuner.targets, f"{tuner.kind}.targets")
    check_choice(tuner.layers, f"{tuner.kind}.layers")
    alone = tuner.layers == EVERY or tuner.part == "language"
    check(alone, f"{tuner.kind}.layers", tuner.layers, "all: only the language model's blocks are numbered")


@dataclass
class Slot:
    """The place of an adapter among several on the same layers.

    Args:
        index: its number in `Routing.adapter`: it acts on the rows that have it.
        active: whether it acts on forwards that give rows no adapters of their own.
    """

    index: int
    active: bool = False


class AdaptedLinear(WeightUpdate):
    """A linear layer that keeps its base as `base_layer` and adds something of its own; see the tuners for what.

    reads_weight: its output depends on the layer's weight itself, which adapters below it must not change.

    Args:
        base: a linear layer, or one that is adapted already; stays as it is but while merged.
        where: which tokens it acts on; at all others the output is the base's, bit for bit.
    """

    wraps_linear = True
    reads_weight: ClassVar[bool] = False
    base_layer: nn.Linear

    def __init__(self, base: nn.Linear, where: Where = "all") -> None:
        super().__init__()
        self.base_layer, self.where = base, where
        self.routed: RoutedModel | None = None  # what tells where the image is, if `where` asks for it
        self.slot: Slot | None = None  # its place in a pool, where it is in one

    @property
    def in_features(self) -> int:
        """d_in."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.base_layer.out_features

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, (d_out,)."""
        return self.base_layer.bias

    @property
    def unmergeable(self) -> str:
        """See `Attachment.unmergeable`."""
        if is_quantised(self):
            return "its base lies in 4 or 8 bits, which would round its update away"
        if self.slot is not None:
            return "it is in a pool, where rows choose their adapters"
        return "" if self.where == "all" else f"it acts on {self.where} tokens alone"

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out) in the base's dtype."""
        out: Tensor = self.base_layer(x)
        if not self.enabled or self.merged:
            return out
        return self._gated(x, out) if self.slot is None else on_rows(self.slot, x, out, self._gated)

    def _gated(self, x: Tensor, out: Tensor) -> Tensor:
        """`adapt` at the tokens of `where`, the base's output at all others."""
        adapted = self.adapt(x, out)
        if self.where == "all":
            return adapted
        return torch.where(selected(current_routing(), self.where, adapted)[..., None], adapted, out)

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """The output with the adapter. Args: x (..., d_in); out (..., d_out), what the base gave."""
        raise NotImplementedError

    def in_own_dtype(self, x: Tensor) -> Tensor:
        """The input in fp32, as the adapter's weights; autocast chooses the dtype of the products by itself."""
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return x if autocast else x.float()

    def take_out(self, model: nn.Module, path: str) -> None:
        """Put the base back in its place."""
        self.unmerge()
        if self.routed is not None:
            self.routed.release()
        replace_module(model, path, self.base_layer)


def on_rows(slot: Slot, x: Tensor, out: Tensor, adapt: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The output of a batch whose rows choose their adapters, or else with that of the pool that is active.

    Args:
        slot: of an adapter around a layer.
        x, out: what the layer gets and gives, a row first.
        adapt: both, of some rows -> the output with the adapter.

    Raises: ModelError M592 if `x` does not have the batch's rows.
    """
    routing = find_routing()
    if routing is None or routing.adapter is None:
        return adapt(x, out) if slot.active else out
    if len(x) != len(routing.adapter):
        message = f"adapters for {len(routing.adapter)} rows, but a layer got {len(x)}."
        raise ModelError("M592", message, "name an adapter, or None, for every row of the batch.")
    rows = routing.rows_of(slot.index)
    if rows is None:
        return out
    if len(rows.numbers) == len(x):
        return adapt(x, out)
    numbers = rows.numbers.to(x.device)
    with routed(rows.routing):
        own = adapt(x.index_select(0, numbers), out.index_select(0, numbers))
    return out.index_copy(0, numbers, own)


def selected(routing: Routing, where: Where, values: Tensor) -> Tensor:
    """(b, s) bool: the tokens an adapter acts on.

    Raises: ModelError M562 where answers are not known; M563 for `values` that are not (b, s, ...).
    """
    if where == "all":
        return routing.visual | routing.text
    mask = {"visual": routing.visual, "text": routing.text, "answer": routing.answer}[where]
    if mask is None:
        raise ModelError("M562", "where=answer, but this forward has no labels and generates nothing.", "give labels.")
    if values.shape[:2] != mask.shape:
        shapes = f"{tuple(values.shape[:-1])} against {tuple(mask.shape)}"
        raise ModelError("M563", f"an adapter with where={where} sees no tokens in order: {shapes}.", "use where=all.")
    return mask


def chain(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer, what it wraps, what that wraps, down to the plain one."""
    while isinstance(layer, Attachment) and layer.wraps_linear:
        yield layer
        layer = layer.get_submodule("base_layer")
    yield layer


def wrap_linears(
    model: nn.Module, parts: Parts, tuner: LinearTuner, wrap: Callable[[nn.Linear], AdaptedLinear]
) -> dict[str, nn.Parameter]:
    """Put an adapter on every linear layer a tuner works on; one of another kind there stays below it.

    Returns: the adapters' parameters by name. Raises: ModelError M550, M551, M552.
    """
    trained: dict[str, nn.Parameter] = {}
    for path, linear in find_linears(model, parts, tuner.part, tuner.targets, tuner.layers).items():
        if not is_linear(linear) or linear is parts.projector:
            fix = "tune it with a tuner of kind full."
            raise ModelError("M551", f"{path} is a {type(linear).__name__}, which {tuner.kind} cannot wrap.", fix)
        layer = wrap(linear)  # type: ignore[arg-type]
        if any(type(below) is type(layer) and below.slot is None for below in chain(linear)):
            raise ModelError(
                "M552", f"{path} already carries an adapter of this kind.", "merge() or remove() it first."
            )
        if tuner.where != "all":
            layer.where, layer.routed = tuner.where, route(model, parts)
        replace_module(model, path, layer.train(linear.training))
        trained |= {f"{path}.{name}": p for name, p in layer.own_parameters().items()}
    return trained
