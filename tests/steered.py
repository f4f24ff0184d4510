"""The two tiny models that the tests of steering share, and what they read of them."""

from __future__ import annotations

import pytest
from tiny_models import logits, make
from torch import Tensor, nn

from vlmpeft.parts import parts_of

__all__ = ["KINDS", "block_outputs", "logits", "make"]


def block_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states behind every block."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in parts_of(model).blocks
    ]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen


KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])
