"""The tiny parts that the pages of docs/ name."""

from __future__ import annotations

from pathlib import Path

RECIPE = """
vision: {name: "hf:tiny-encoder", layer: -2}
language: {name: tiny-llm}
projector: {name: mlp2x_gelu}
data: {instruct: train.json, images: images, max_length: 256, workers: 0}
source: instruct
template: chatml
tuners:
  lora: {kind: lora, r: 4}
  projector: {kind: full, part: projector}
optim: {lr: 1e-3, steps: 2}
batch: {size: 4, micro: 2}
run: {dir: runs/tiny, device: cpu, precision: fp32}
"""


def make_encoder(directory: Path) -> Path:
    """A CLIP vision tower of 32 px with 16 patches and random weights, as a directory."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(directory)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(directory)
    return directory


def make_recipe(path: Path) -> Path:
    """A one-stage recipe over the tiny parts."""
    path.write_text(RECIPE, encoding="utf-8")
    return path
