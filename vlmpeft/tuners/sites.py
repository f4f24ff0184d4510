"""Where attention, MLPs and norms stand in a part, by what the libraries call them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, path_of
from vlmpeft.tuners.block_choice import EVERY, Choice, which_blocks

ATTENTION = ("self_attn", "self_attention", "attention", "attn")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True)
class Site:
    """A module inside a block, and the width of what the block adds to its residual stream."""

    path: str
    module: nn.Module
    width: int


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises features: torch's norms without running statistics, and classes named ...Norm."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) or type(module).__name__.endswith("Norm")


def roots_of(model: nn.Module, parts: Parts, part: str, layers: Choice = EVERY) -> Iterator[tuple[str, nn.Module]]:
    """The modules a part is searched in, by path: for "language" its blocks alone, those of `layers`."""
    blocks = [parts.blocks[n] for n in which_blocks(layers, len(parts.blocks), "layers")] if part == "language" else []
    for root in blocks or [parts.get(part)]:
        yield path_of(model, root), root


def block_sites(
    model: nn.Module, parts: Parts, part: str, names: Collection[str], layers: Choice = EVERY
) -> list[Site]:
    """The modules of these names inside the numbered blocks of a part; one that is wrapped as a whole.

    Raises: ModelError M550 if there are none.
    """
    found: list[Site] = []
    for prefix, root in roots_of(model, parts, part, layers):
        for name, block in root.named_modules():
            path = ".".join(p for p in (prefix, name) if p)
            if path.rsplit(".", 1)[-1].isdigit():
                width = next((p.shape[0] for n in block.children() if is_norm(n) for p in n.parameters()), None)
                inside = [(k, m) for k, m in block.named_children() if k in names]
                found += [Site(f"{path}.{k}", m, width) for k, m in inside if width is not None]
    if not found:
        known = ", ".join(names)
        raise ModelError("M550", f"no block in {part} with a module called one of {known}.", "choose another part.")
    return found
