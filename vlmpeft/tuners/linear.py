"""Finding and wrapping linear layers: what the adapters on linear layers share. Letters: d_in d_out widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError, nearest
from vlmpeft.parts import Parts, path_of
from vlmpeft.tuners.attachment import Attachment

ALL_LINEAR = "all-linear"
PRESETS = {"minimal": ("q_proj", "v_proj"), "standard": ("q_proj", "k_proj", "v_proj", "o_proj")}


class AdaptedLinear(Attachment):
    """A linear layer that keeps its base as `base_layer` and adds something of its own; see the tuners for what.

    Args:
        base: stays as it is but while merged.
    """

    base_layer: nn.Linear

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.merged_from: Tensor | None = None  # the base weight as it was before `merge`

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update."""
        return self.merged_from is not None

    def delta(self) -> Tensor:
        """What the adapter adds to the base weight, (d_out, d_in)."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the base weight; `unmerge` brings the old weight back bit for bit."""
        weight = self.base_layer.weight
        if self.merged_from is None:
            self.merged_from = weight.detach().clone()
            weight.copy_(weight + self.delta())  # the sum in fp32 or wider, rounded once

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.merged_from is not None:
            self.base_layer.weight.copy_(self.merged_from)
            self.merged_from = None

    def settle(self) -> None:
        """Merge for good: the old weight is forgotten."""
        self.merge()
        self.merged_from = None

    def take_out(self, model: nn.Module, path: str) -> None:
        """Put the base back in its place."""
        self.unmerge()
        replace_module(model, path, self.base_layer)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with a 2-D weight: torch's and what derives from it, quantised ones included."""
    return isinstance(module, nn.Linear)


def find_linears(model: nn.Module, parts: Parts, part: str, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers a tuner works on.

    Args:
        part: searched alone: for "language" only its blocks, so that neither head nor vision tower is ever hit.
        targets: "all-linear", "minimal" (q, v), "standard" (q, k, v, o), or exact last names of layers.

    Returns: layers by their path in `model`.
    Raises: ModelError M550 if a name matches nothing in the part; M552 if a layer carries an adapter already.
    """
    found = _linears(model, list(parts.blocks) if part == "language" else [parts.get(part)])
    if targets == ALL_LINEAR:
        chosen = found
    else:
        names = _names(targets)
        known = {path.rsplit(".", 1)[-1] for path in found}
        for name in names:
            if name not in known:
                fix = "name layers exactly, or use targets=all-linear."
                raise ModelError("M550", f"no linear layer '{name}' in {part}{nearest(name, known)}", fix)
        chosen = {path: module for path, module in found.items() if path.rsplit(".", 1)[-1] in names}
    if not chosen:
        raise ModelError("M550", f"no linear layer in {part} to put an adapter on.", "choose another part or targets.")
    for path, module in chosen.items():
        if isinstance(module, AdaptedLinear):
            raise ModelError("M552", f"{path} already carries an adapter.", "merge() or remove() it first.")
    return chosen


def _linears(model: nn.Module, roots: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Linear layers below `roots` by their path in `model`; one with an adapter as a whole, never its insides."""
    found: dict[str, nn.Module] = {}
    for root in roots:
        prefix = path_of(model, root)
        inside: set[nn.Module] = set()
        for name, module in root.named_modules():
            if isinstance(module, AdaptedLinear):
                inside.update(module.children())
            if isinstance(module, AdaptedLinear) or (is_linear(module) and module not in inside):
                found[".".join(p for p in (prefix, name) if p)] = module
    return found


def _names(targets: str | Sequence[str]) -> Sequence[str]:
    """The layer names that a preset, a name or a list of names stands for."""
    if isinstance(targets, str):
        return PRESETS.get(targets, (targets,))
    return targets


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
