"""Which linear layers a tuner works on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from vlmpeft.errors import ModelError, nearest
from vlmpeft.parts import Parts, path_of
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import check
from vlmpeft.tuners.block_choice import EVERY, Choice, which_blocks

ALL_LINEAR = "all-linear"
PATTERN = "re:"
PRESETS = {"minimal": ("q_proj", "v_proj"), "standard": ("q_proj", "k_proj", "v_proj", "o_proj")}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with a 2-D weight: torch's, what derives from it, and either with an adapter."""
    return isinstance(module, nn.Linear) or (isinstance(module, Attachment) and module.wraps_linear)


def find_linears(
    model: nn.Module, parts: Parts, part: str, targets: str | Sequence[str], layers: Choice = EVERY
) -> dict[str, nn.Module]:
    """The linear layers a tuner works on.

    Args:
        part: searched alone: for "language" only its blocks, so that neither head nor vision tower is ever hit.
        targets: "all-linear", "minimal" (q, v), "standard" (q, k, v, o), exact last names of layers, or "re:" and a
            regular expression that matches whole paths below the part, which begin with the block's number.
        layers: blocks of the language model; see `which_blocks`.

    Returns: layers by their path in `model`.
    Raises: ModelError M550 if a name, or the expression, matches nothing in the part.
    """
    blocks = [parts.blocks[n] for n in which_blocks(layers, len(parts.blocks), "layers")] if part == "language" else []
    found = _linears(model, blocks or [parts.get(part)])
    if targets == ALL_LINEAR:
        chosen = found
    elif isinstance(targets, str) and targets.startswith(PATTERN):
        roots = [path_of(model, block).rpartition(".")[0] for block in blocks] or [path_of(model, parts.get(part))]
        chosen = _matching(found, targets, roots, part)
    else:
        chosen = _named(found, targets, part)
    if not chosen:
        raise ModelError("M550", f"no linear layer in {part} to put an adapter on.", "choose another part or targets.")
    return chosen


def _named(found: Mapping[str, nn.Module], targets: str | Sequence[str], part: str) -> dict[str, nn.Module]:
    """Layers by their exact last names, each of which must be there. Raises: ModelError M550."""
    names = _names(targets)
    known = {path.rsplit(".", 1)[-1] for path in found}
    for name in names:
        if name not in known:
            fix = "name layers exactly, or use targets=all-linear."
            raise ModelError("M550", f"no linear layer '{name}' in {part}{nearest(name, known)}", fix)
    return {path: module for path, module in found.items() if path.rsplit(".", 1)[-1] in names}


def _matching(found: Mapping[str, nn.Module], targets: str, roots: Sequence[str], part: str) -> dict[str, nn.Module]:
    """Layers whose whole path below the part matches an expression. Raises: ModelError M550 for none."""
    pattern = re.compile(targets.removeprefix(PATTERN))
    below = {path: min((path.removeprefix(f"{root}.") for root in roots), key=len) for path in found}
    chosen = {path: module for path, module in found.items() if pattern.fullmatch(_plain(below[path]))}
    if not chosen:
        example = _plain(next(iter(below.values()), "0.self_attn.q_proj"))
        raise ModelError(
            "M550", f"targets={targets} matches no linear layer in {part}.", f"match paths like {example}."
        )
    return chosen


def _plain(path: str) -> str:
    """A path without what adapters put into it."""
    return path.replace(".base_layer", "")


def check_targets(targets: str | Sequence[str], key: str) -> None:
    """Raise ConfigError C102 for an empty list, or an expression that is none."""
    check(bool(targets), key, targets, "all-linear, minimal, standard, re:EXPRESSION or a list of layer names")
    if isinstance(targets, str) and targets.startswith(PATTERN):
        try:
            re.compile(targets.removeprefix(PATTERN))
        except re.error as error:
            check(False, key, targets, f"a regular expression after {PATTERN} ({error})")


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
