"""Finding and wrapping linear layers: what the adapters on linear layers share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vlmpeft.errors import ModelError, nearest
from vlmpeft.parts import Parts, path_of

ALL_LINEAR = "all-linear"
PRESETS = {"minimal": ("q_proj", "v_proj"), "standard": ("q_proj", "k_proj", "v_proj", "o_proj")}


class AdaptedLinear(nn.Module):
    """A linear layer that keeps its base as `base_layer` and adds something of its own; see the tuners for what."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with a 2-D weight: torch's and what derives from it, quantised ones included."""
    return isinstance(module, nn.Linear)


def find_linears(model: nn.Module, parts: Parts, part: str, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers a tuner works on.

    Args:
        part: searched alone: for "language" only its blocks, so that neither head nor vision tower is ever hit.
        targets: "all-linear", "minimal" (q, v), "standard" (q, k, v, o), or exact last names of layers.

    Returns: layers by their path in `model`.
    Raises: ModelError M550 if a name matches nothing in the part.
    """
    roots = list(parts.blocks) if part == "language" else [parts.get(part)]
    found: dict[str, nn.Module] = {}
    for root in roots:
        prefix = path_of(model, root)
        for name, module in root.named_modules():
            if is_linear(module) and not isinstance(module, AdaptedLinear):
                found[".".join(p for p in (prefix, name) if p)] = module
    if targets == ALL_LINEAR:
        chosen = found
    else:
        names = [targets] if isinstance(targets, str) and targets not in PRESETS else PRESETS.get(str(targets), targets)
        known = {path.rsplit(".", 1)[-1] for path in found}
        for name in names:
            if name not in known:
                raise ModelError("M550", f"no linear layer '{name}' in {part}{nearest(name, known)}", "name layers exactly, or use targets=all-linear.")
        chosen = {path: module for path, module in found.items() if path.rsplit(".", 1)[-1] in names}
    if not chosen:
        raise ModelError("M550", f"no linear layer in {part} to put an adapter on.", "choose another part.")
    return chosen


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
