"""Bottleneck adapters behind attention and MLP (arXiv:1902.00751), or behind the MLP alone (arXiv:2005.00247)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice, check_choice
from vlmpeft.tuners.bottleneck_layers import Activation, Bottleneck, wrap_sites
from vlmpeft.tuners.linear import Where, check_where
from vlmpeft.tuners.sites import ATTENTION, MLP, Site

Placement = Literal["houlsby", "pfeiffer"]


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
        layers: as LoRA's, of the language model.
        lr: learning rate of its own; the default is that of arXiv:2304.01933 for adapters in language models.
    """

    kind: ClassVar[str] = "bottleneck"
    dim: int = 64
    placement: Placement = "houlsby"
    activation: Activation = "relu"
    part: str = "language"
    where: Where = "all"
    layers: Choice = EVERY
    lr: float | None = 3e-4

    def __post_init__(self) -> None:
        check_where(self)
        check_choice(self.layers, "bottleneck.layers")
        alone = self.layers == EVERY or self.part == "language"
        check(alone, "bottleneck.layers", self.layers, "all: only the language model's blocks are numbered")
        check(self.dim >= 1, "bottleneck.dim", self.dim, "an integer of at least 1")
        for key, kinds in (("placement", Placement), ("activation", Activation)):
            value = self.placement if key == "placement" else self.activation
            check(value in get_args(kinds), f"bottleneck.{key}", value, "one of " + ", ".join(get_args(kinds)))
        check(self.lr is None or 0 < self.lr <= 1, "bottleneck.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap attention and MLPs. Returns: weights and biases of the adapters, by name. Raises: as `wrap_sites`."""
        names = MLP if self.placement == "pfeiffer" else (*ATTENTION, *MLP)
        return wrap_sites(model, parts, self, names, self._adapter)

    def _adapter(self, site: Site) -> Bottleneck:
        return Bottleneck(site.module, site.width, self.dim, self.activation)


def parameter_count(width: int, dim: int, modules: int) -> int:
    """2 d k + k + d for each adapted module."""
    return (2 * width * dim + dim + width) * modules
