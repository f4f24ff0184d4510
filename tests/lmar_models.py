"""A LLaVA whose attention is far from uniform, inputs for it, and LMAR by its definition from attention matrices."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import IMAGE_ID
from torch import Tensor

TOKENS = 4  # of one image, in both models


def llava(attention: str, heads: int = 4, key_heads: int = 2) -> Any:
    """LLaVA of transformers with large weights, so that attention is far from uniform."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=key_heads, max_position_embeddings=64, initializer_range=0.25, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def batch(side: str) -> dict[str, Tensor]:
    """Two samples of unequal length, the longer with two images, padded on one side."""
    image = [IMAGE_ID] * TOKENS
    rows = [[7, *image, 20, 21, 22, 23, 24, 25], [8, 9, *image, 30, *image, 31, 32, 33, 34]]
    answers = [2, 3]
    ids, mask, labels = (torch.zeros(2, 15, dtype=torch.long) for _ in range(3))
    labels -= 100
    for b, (row, count) in enumerate(zip(rows, answers, strict=True)):
        start = 15 - len(row) if side == "left" else 0
        ids[b, start : start + len(row)] = torch.tensor(row)
        mask[b, start : start + len(row)] = 1
        end = start + len(row)
        labels[b, end - count : end] = ids[b, end - count : end]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def from_matrices(attentions: Any, inputs: dict[str, Tensor], queries: str) -> tuple[Tensor, Tensor]:
    """Ratio (n, l) and mass (n, l) by the definition, from the matrices (b, h, s, s) that eager attention returns."""
    image, text, mass = alphas_from_matrices(attentions, inputs, queries)
    return image / text, mass


def alphas_from_matrices(attentions: Any, inputs: dict[str, Tensor], queries: str) -> tuple[Tensor, Tensor, Tensor]:
    """Attention an image and a text token get, and mass, (n, l) each."""
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["labels"]
    image_alpha, text_alpha, share = (torch.zeros(len(ids), len(attentions)) for _ in range(3))
    for layer, weights in enumerate(attentions):
        for b in range(len(ids)):
            image = {i for i in range(ids.shape[1]) if ids[b, i] == IMAGE_ID}
            real = {i for i in range(ids.shape[1]) if mask[b, i]}
            answer = {i for i in real if labels[b, i] != -100}
            asked = {i - 1 for i in answer} if queries == "output" else real - image
            alphas = []
            for q in sorted(asked):
                sees = [sorted(i for i in x if i <= q) for x in (image, real - image - answer)]
                share[b, layer] += weights[b, :, q, sees[0]].sum(-1).mean() / len(asked)
                if all(sees):
                    alphas.append([weights[b, :, q, x].mean(-1).mean() for x in sees])
            image_alpha[b, layer], text_alpha[b, layer] = torch.tensor(alphas).mean(0)
    return image_alpha, text_alpha, share
