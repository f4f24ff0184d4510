"""What the tests of quantised bases share: a language model whose layers fill whole blocks, and its dense twin."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tiny_models import our_vlm
from torch import Tensor, nn

from vlmpeft.quant import QuantConfig, quantise
from vlmpeft.quant_weight import is_quantised, plain_weight
from vlmpeft.tuners.targets import replace_module
from vlmpeft.vlm import VLM

NF4 = QuantConfig(4, compute="fp32")
EIGHT = QuantConfig(8)


def make_wide(directory: Path) -> Path:
    """A two-block Llama with biases in its attention: 128 * 128 weights are 256 blocks of 64, one block of scales."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1, attention_bias=True,
        tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(directory)
    return directory


def quantised_vlm(
    language: Path, config: QuantConfig = NF4, dtype: torch.dtype = torch.float32, keep: bool = False
) -> VLM:
    model = our_vlm(language, dtype).requires_grad_(False)
    quantise(model, config, keep_originals=keep)
    return model


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    return {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantised(m)}


class Dense(nn.Module):
    """What a quantised layer stands for: dequantise, then F.linear in the precision of the products."""

    def __init__(self, layer: Any, compute: torch.dtype) -> None:
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach().to(compute)
        self.weight, self.bias = plain_weight(layer).to(compute), bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def dense_twin(model: nn.Module, compute: torch.dtype = torch.float32) -> nn.Module:
    """A copy of a model with every quantised layer, also below adapters, made dense."""
    twin = copy.deepcopy(model)
    for path, layer in quantised_layers(twin).items():
        replace_module(twin, path, Dense(layer, compute))
    return twin
