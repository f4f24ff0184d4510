"""Tiny VLMs with random weights for the tests of tuners: one we assemble, one of Hugging Face's LLaVA layout."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.projectors import PROJECTORS
from vlmpeft.vlm import VLM

WIDTH, TOKENS = 12, 4
IMAGE_ID = 99  # image token of the Hugging Face model


class Patches(nn.Module):
    """(i, 3, 4, 4) -> (i, 4, 12): the pixels of 2x2 patches through one layer named as CLIP names its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(TOKENS)  # buffers that would move if the encoder were trained

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return self.norm(self.q_proj(patches))

    def train(self, mode: bool = True) -> Patches:
        return super().train(False)


def our_vlm(language: Path, dtype: torch.dtype = torch.float32) -> VLM:
    """A copy, as reading one takes four times as long; what is drawn after it is the same every time."""
    model = copy.deepcopy(_our_vlm(language, dtype))
    torch.manual_seed(1)
    return model


@functools.cache
def _our_vlm(language: Path, dtype: torch.dtype) -> VLM:
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    torch.manual_seed(0)
    projector: Any = PROJECTORS.build("mlp2x_gelu", WIDTH, causal_lm.config.hidden_size)
    return VLM(Patches().to(dtype), projector, causal_lm).eval()


def our_inputs() -> dict[str, Tensor]:
    torch.manual_seed(5)
    ids = torch.tensor([[7, *[IMAGE_TOKEN_ID] * TOKENS, 20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37]])
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(1, 3, 4, 4)}


def hf_llava(tie: bool = False) -> Any:
    """A copy, as `our_vlm`."""
    model = copy.deepcopy(_hf_llava(tie))
    torch.manual_seed(1)
    return model


@functools.cache
def _hf_llava(tie: bool) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=tie,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, tie_word_embeddings=tie)
    return LlavaForConditionalGeneration(config).eval()


def hf_inputs() -> dict[str, Tensor]:
    torch.manual_seed(5)
    ids = torch.tensor([[7, *[IMAGE_ID] * 4, 20, 21, 22]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8), "labels": ids.masked_fill(ids == IMAGE_ID, -100)}


def randomise(parameters: dict[str, nn.Parameter], seed: int = 3, scale: float = 0.1) -> None:
    """Give tuned parameters values that change the outputs: B is zero at init."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor, buffers included, under the names without adapters."""
    return {k.replace(".base_layer.", "."): v.detach().clone() for k, v in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names whose bytes differ from `before`, and names that come or go."""
    now = state_of(model)
    differ = {k for k in now.keys() & before.keys() if now[k].dtype != before[k].dtype or not now[k].equal(before[k])}
    return differ | (now.keys() ^ before.keys())


def make(kind: str, language_dir: Path) -> tuple[Any, dict[str, Tensor]]:
    """A model we assemble ("ours") or one of Hugging Face's, and inputs for it."""
    return (our_vlm(language_dir), our_inputs()) if kind == "ours" else (hf_llava(), hf_inputs())


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a model gives without labels and gradients."""
    with torch.no_grad():
        out: Tensor = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    return out
