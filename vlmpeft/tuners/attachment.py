"""What a tuner puts into a model, around a layer or beside the blocks, and how it comes out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BASE = "base_layer."  # what an attachment that wraps a layer keeps it under


class Attachment(nn.Module):
    """A module that a tuner added. `enabled` set to False lets the model work as if it were not there.

    wraps_linear: it stands for a linear layer, its `base_layer`, as a whole.
    """

    wraps_linear: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    @property
    def unmergeable(self) -> str:
        """Why it has no form as weights of the base; "" if it has one."""
        return ""

    @property
    def merged(self) -> bool:
        """Whether the base's weights hold it now."""
        return False

    def merge(self) -> None:
        """Fold it into the base's weights; called only if it can be."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""

    def settle(self) -> None:
        """Merge for good."""
        self.merge()

    def take_out(self, model: nn.Module, path: str) -> None:
        """Leave the model as it was before. Args: path: where it stands in `model`."""
        raise NotImplementedError

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters by name below it, without those of the layer it wraps."""
        return {k: p for k, p in self.named_parameters() if not k.startswith(BASE)}

    def own_modules(self) -> list[nn.Module]:
        """Every module below it but the layer it wraps and what is in it; a linear layer's base counts as its own."""
        return [m for k, m in self.named_modules() if k and (self.wraps_linear or not f"{k}.".startswith(BASE))]


class WeightUpdate(Attachment):
    """An attachment around one layer, whose effect is an update of that layer's weight."""

    base_layer: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.merged_from: Tensor | None = None  # the base weight as it was before `merge`

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update."""
        return self.merged_from is not None

    def delta(self) -> Tensor:
        """What it adds to the base weight, in fp32."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the base weight; `unmerge` brings the old weight back bit for bit."""
        weight = self.weight
        if self.merged_from is None:
            self.merged_from = weight.detach().clone()
            weight.copy_(weight + self.delta())  # the sum in fp32 or wider, rounded once

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.merged_from is not None:
            self.weight.copy_(self.merged_from)
            self.merged_from = None

    def settle(self) -> None:
        """Merge for good: the old weight is forgotten."""
        self.merge()
        self.merged_from = None
