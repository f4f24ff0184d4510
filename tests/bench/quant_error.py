"""What 4 bits lose on the weights of a real language model: NF4, FP4, E2M1 and Int4 in blocks of 64 with fp32 scales.

python tests/bench/quant_error.py language=NAME_OR_DIR
The error of the weights is relative, sqrt(sum (q - w)^2 / sum w^2), over the linear layers of all blocks. The loss is
per token, on the sentences of recipes/retention.jsonl, with the weights replaced by what the bits stand for.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from vlmpeft.language import load_language

BLOCK = 64


def int4(weight: Tensor) -> Tensor:
    """Symmetric 4-bit integers: 15 levels from -7 to 7 times absmax / 7 of the block."""
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
    return ((blocks / scale).round() * scale).reshape(weight.shape)


def float4(kind: str) -> Callable[[Tensor], Tensor]:
    """bitsandbytes' round trip through "nf4" or "fp4"."""

    def trip(weight: Tensor) -> Tensor:
        packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
        return dequantize_4bit(packed, state)

    return trip


def e2m1(weight: Tensor) -> Tensor:
    """Floats of two bits of exponent and one of mantissa, the FP4 that QLoRA's paper compares with NF4."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) / 6
    codes = torch.cat([-levels[1:].flip(0), levels])
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    return (codes[torch.bucketize(blocks / scale, (codes[1:] + codes[:-1]) / 2)] * scale).reshape(weight.shape)


FORMATS = {"nf4": float4("nf4"), "fp4": float4("fp4"), "e2m1": e2m1, "int4": int4}


@torch.no_grad()
def loss(model: Any, tokenizer: Any) -> float:
    """Mean cross entropy of a token of the sentences."""
    lines = resources.files("vlmpeft.recipes").joinpath("retention.jsonl").read_text(encoding="utf-8").splitlines()
    summed = count = 0.0
    for text in (row["text"] for row in map(json.loads, lines) if "text" in row):
        ids = tokenizer(text, return_tensors="pt").input_ids
        summed += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return summed / count


@torch.no_grad()
def main() -> None:
    """Print a row a format."""
    name = dict(argument.split("=", 1) for argument in sys.argv[1:])["language"]
    model, tokenizer = load_language(name)
    blocks = next(m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList))
    layers = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    weights = [layer.weight.clone() for layer in layers]
    print(
        f"{name}: {len(layers)} layers, {sum(w.numel() for w in weights):,} weights; loss {loss(model, tokenizer):.4f}"
    )
    for kind, trip in FORMATS.items():
        away = whole = 0.0
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(trip(weight))
            away += (layer.weight - weight).square().sum().item()
            whole += weight.square().sum().item()
        print(f"{kind:5} error {math.sqrt(away / whole):.4f}  loss {loss(model, tokenizer):.4f}")


if __name__ == "__main__":
    main()
