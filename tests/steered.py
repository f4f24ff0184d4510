"""The two tiny models that the tests of steering share, and what they read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import hf_inputs, hf_llava, our_inputs, our_vlm
from torch import Tensor, nn

from vlmpeft.parts import parts_of


def make(kind: str, language_dir: Path) -> tuple[Any, dict[str, Tensor]]:
    return (our_vlm(language_dir), our_inputs()) if kind == "ours" else (hf_llava(), hf_inputs())


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    return out


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
