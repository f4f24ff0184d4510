"""A bottleneck adapter behind a module, and behind all modules of a kind in a part's blocks.

Letters: b batch, s sequence, d width, k bottleneck.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.routed import RoutedModel, current_routing, route
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.block_choice import Choice
from vlmpeft.tuners.linear import GatedTuner, Slot, Where, on_rows, selected
from vlmpeft.tuners.sites import MLP, Site, block_sites
from vlmpeft.tuners.targets import replace_module

Activation = Literal["relu", "gelu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Bottleneck(Attachment):
    """h + W_up act(W_down h + b_down) + b_up on what a module gives, h (..., d), before the block adds it up.

    W_down (k, d) as nn.Linear starts, W_up (d, k) and b_up zero, so that the module starts as it was. All in fp32.

    Args: base: an attention or an MLP, whose (first) output is h.

    `where` says which tokens it acts on; at all others the output is the base's, bit for bit.
    """

    def __init__(self, base: nn.Module, width: int, dim: int, activation: Activation) -> None:
        super().__init__()
        self.base_layer, self.activation = base, activation
        self.where: Where = "all"
        self.routed: RoutedModel | None = None  # what tells where the image is, if `where` asks for it
        self.slot: Slot | None = None  # its place in a pool, where it is in one
        device = next(base.parameters()).device
        self.down = nn.Linear(width, dim, device=device, dtype=torch.float32)
        self.up = nn.Linear(dim, width, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.train(base.training)

    @property
    def unmergeable(self) -> str:
        """See `Attachment.unmergeable`."""
        return "its activation lies between its weights and those of the base"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base gives for these arguments, its first output adapted."""
        out = self.base_layer(*args, **kwargs)
        if not self.enabled:
            return out
        given = args[0] if args else kwargs.get("hidden_states")
        return (self._act(out[0], given), *out[1:]) if isinstance(out, tuple) else self._act(out, given)

    def _act(self, hidden: Tensor, given: Any) -> Tensor:
        """`adapt` on all rows, or on those that choose this adapter of a pool."""
        if self.slot is None:
            return self.adapt(hidden, given)
        return on_rows(self.slot, given, hidden, lambda x, out: self.adapt(out, x))

    def update(self, hidden: Tensor, given: Any) -> Tensor:
        """What is added to h (b, s, d), in fp32. Args: given: what the base was called with first."""
        added: Tensor = self.up(ACTIVATIONS[self.activation](self.down(hidden.float())))
        return added

    def adapt(self, hidden: Tensor, given: Any) -> Tensor:
        """(b, s, d) -> (b, s, d) in the same dtype. Args: given: as in `update`."""
        update = self.update(hidden, given)
        adapted = (hidden + update).to(hidden.dtype)
        if self.where == "all":
            return adapted
        return torch.where(selected(current_routing(), self.where, hidden)[..., None], adapted, hidden)

    def take_out(self, model: nn.Module, path: str) -> None:
        """See `Attachment.take_out`."""
        if self.routed is not None:
            self.routed.release()
        replace_module(model, path, self.base_layer)


def _below(module: nn.Module) -> Iterator[Bottleneck]:
    """A module and what it wraps, as long as these are bottlenecks."""
    while isinstance(module, Bottleneck):
        yield module
        module = module.base_layer


class BlockTuner(GatedTuner, Protocol):
    """What a tuner of modules in blocks says of them."""

    @property
    def layers(self) -> Choice: ...


def wrap_sites(
    model: nn.Module, parts: Parts, tuner: BlockTuner, names: Collection[str], make: Callable[[Site], Bottleneck]
) -> dict[str, nn.Parameter]:
    """Put adapters behind the modules of these names in the blocks of a part.

    Returns: their parameters by name. Raises: ModelError M550 if there are none, or none for an MLP; M551 for one that
        adds to the residual stream by itself; M552 for one that has an adapter.
    """
    sites = block_sites(model, parts, tuner.part, names, tuner.layers)
    if not any(site.path.rsplit(".", 1)[-1] in MLP for site in sites):  # as OPT, whose blocks hold fc1 and fc2
        raise ModelError("M550", f"the blocks of {tuner.part} have no module for their MLP.", "use lora or ia3.")
    trained: dict[str, nn.Parameter] = {}
    for site in sites:
        if any(below.slot is None for below in _below(site.module)):
            raise ModelError("M552", f"{site.path} already carries an adapter of this kind.", "remove() it first.")
        if "residual" in inspect.signature(site.module.forward).parameters:  # as BLOOM's
            message = f"{site.path} adds to the residual stream by itself: there is no place before that."
            raise ModelError("M551", message, "use lora or ia3.")
        adapter = make(site)
        if tuner.where != "all":
            adapter.where, adapter.routed = tuner.where, route(model, parts)
        replace_module(model, site.path, adapter)
        trained |= {f"{site.path}.{name}": p for name, p in adapter.own_parameters().items()}
    return trained
