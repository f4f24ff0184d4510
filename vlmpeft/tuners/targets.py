"""Which linear layers a tuner works on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vlmpeft.errors import ModelError, nearest
from vlmpeft.parts import Parts, path_of
from vlmpeft.tuners.attachment import Attachment

ALL_LINEAR = "all-linear"
PRESETS = {"minimal": ("q_proj", "v_proj"), "standard": ("q_proj", "k_proj", "v_proj", "o_proj")}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with a 2-D weight: torch's, what derives from it, and either with an adapter."""
    return isinstance(module, nn.Linear) or (isinstance(module, Attachment) and module.wraps_linear)


def find_linears(model: nn.Module, parts: Parts, part: str, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers a tuner works on.

    Args:
        part: searched alone: for "language" only its blocks, so that neither head nor vision tower is ever hit.
        targets: "all-linear", "minimal" (q, v), "standard" (q, k, v, o), or exact last names of layers.

    Returns: layers by their path in `model`.
    Raises: ModelError M550 if a name matches nothing in the part.
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
    return chosen


def _linears(model: nn.Module, roots: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Linear layers below `roots` by their path in `model`; one with an adapter as a whole, never its insides."""
    found: dict[str, nn.Module] = {}
    for root in roots:
        prefix = path_of(model, root)
        inside: set[nn.Module] = set()
        for name, module in root.named_modules():
            if module in inside:
                continue
            if isinstance(module, Attachment):
                inside.update(module.own_modules())
            if is_linear(module):
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
