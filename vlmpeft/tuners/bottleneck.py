"""Bottleneck adapters behind attention and MLP (arXiv:1902.00751), or behind the MLP alone (arXiv:2005.00247).

Letters: b batch, s sequence, d width, k bottleneck.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.routed import RoutedModel, current_routing, route
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.linear import Where, check_where, selected
from vlmpeft.tuners.sites import ATTENTION, MLP, Site, block_sites
from vlmpeft.tuners.targets import replace_module

Placement = Literal["houlsby", "pfeiffer"]
Activation = Literal["relu", "gelu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Bottleneck(Attachment):
    """h + W_up act(W_down h + b_down) + b_up on what a module gives, h (..., d), before the block adds it up.

    W_down (k, d) as nn.Linear starts, W_up (d, k) and b_up zero, so that the module starts as it was. All in fp32.

    Args:
        base: an attention or an MLP, whose (first) output is h.
        where: which tokens it acts on; at all others the output is the base's, bit for bit.
    """

    def __init__(self, base: nn.Module, width: int, dim: int, activation: Activation, where: Where = "all") -> None:
        super().__init__()
        self.base_layer, self.activation, self.where = base, activation, where
        self.routed: RoutedModel | None = None  # what tells where the image is, if `where` asks for it
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
        return (self.adapt(out[0]), *out[1:]) if isinstance(out, tuple) else self.adapt(out)

    def adapt(self, hidden: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d) in the same dtype."""
        update = self.up(ACTIVATIONS[self.activation](self.down(hidden.float())))
        adapted = (hidden + update).to(hidden.dtype)
        if self.where == "all":
            return adapted
        return torch.where(selected(current_routing(), self.where, hidden)[..., None], adapted, hidden)

    def take_out(self, model: nn.Module, path: str) -> None:
        """See `Attachment.take_out`."""
        if self.routed is not None:
            self.routed.release()
        replace_module(model, path, self.base_layer)


@TUNERS.register("bottleneck")
@dataclass(frozen=True)
class BottleneckAdapter:
    """A small MLP behind the attention and the MLP of every block, or behind the MLP.

    Args:
        dim: the bottleneck.
        placement: "houlsby" behind attention and MLP, "pfeiffer" behind the MLP alone.
        activation: "relu" or "gelu".
        part: "language", or "vision" where its blocks are named as transformers or timm name them.
        where: "all", "visual", "text" or "answer" tokens: at the others the model stays its base.
        lr: learning rate of its own; the default is that of arXiv:2304.01933 for adapters in language models.
    """

    kind: ClassVar[str] = "bottleneck"
    dim: int = 64
    placement: Placement = "houlsby"
    activation: Activation = "relu"
    part: str = "language"
    where: Where = "all"
    lr: float | None = 3e-4

    def __post_init__(self) -> None:
        check_where(self)
        check(self.dim >= 1, "bottleneck.dim", self.dim, "an integer of at least 1")
        for key, kinds in (("placement", Placement), ("activation", Activation)):
            value = self.placement if key == "placement" else self.activation
            check(value in get_args(kinds), f"bottleneck.{key}", value, "one of " + ", ".join(get_args(kinds)))
        check(self.lr is None or 0 < self.lr <= 1, "bottleneck.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap attention and MLPs. Returns: weights and biases of the adapters, by name.

        Raises: ModelError M550 if there are none to wrap, M551 for one that adds to the residual stream by itself.
        """
        names = MLP if self.placement == "pfeiffer" else (*ATTENTION, *MLP)
        sites = block_sites(model, parts, self.part, names)
        if not any(site.path.rsplit(".", 1)[-1] in MLP for site in sites):  # as OPT, whose blocks hold fc1 and fc2
            raise ModelError("M550", f"the blocks of {self.part} have no module for their MLP.", "use lora or ia3.")
        trained: dict[str, nn.Parameter] = {}
        for site in sites:
            adapter = self._adapter(site)
            if self.where != "all":
                adapter.routed = route(model, parts)
            replace_module(model, site.path, adapter)
            trained |= {f"{site.path}.{name}": p for name, p in adapter.own_parameters().items()}
        return trained

    def _adapter(self, site: Site) -> Bottleneck:
        if isinstance(site.module, Bottleneck):
            raise ModelError("M552", f"{site.path} already carries an adapter of this kind.", "remove() it first.")
        if "residual" in inspect.signature(site.module.forward).parameters:  # as BLOOM's
            message = f"{site.path} adds to the residual stream by itself: there is no place before that."
            raise ModelError("M551", message, "use lora or ia3.")
        return Bottleneck(site.module, site.width, self.dim, self.activation, self.where)


def parameter_count(width: int, dim: int, modules: int) -> int:
    """2 d k + k + d for each adapted module."""
    return (2 * width * dim + dim + width) * modules
