"""Tiny native models with a real CLIP or SigLIP tower, a LoRA and a projector away from their start, for exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_language
from torch import Tensor

from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.build import Bundle, build
from vlmpeft.checkpoint import save
from vlmpeft.config import load_recipe

SIZE, PATCH, TOKENS = 32, 8, 16
LAYERS = {"clip": -2, "siglip": -1}
RECIPE = """
vision: {{name: "hf:{vision}", layer: {layer}}}
language: {{name: "{language}"}}
stages:
  instruct:
    template: chatml
    tuners: {{lora: {{kind: lora, r: 4}}, projector: {{kind: full, part: projector}}}}
run: {{precision: fp32, device: cpu}}
"""


def make_tower(directory: Path, kind: str) -> Path:
    """A tower of three blocks as a directory with its processor's settings."""
    import transformers as hf

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    options = {**shape, "image_size": SIZE, "patch_size": PATCH}
    clip = kind == "clip"
    tower: Any = (
        hf.CLIPVisionModel(hf.CLIPVisionConfig(**options))
        if clip
        else hf.SiglipVisionModel(hf.SiglipVisionConfig(**options))
    )
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    tower.save_pretrained(directory)
    processor: Any = hf.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(directory)
    return directory


def make_native(folder: Path, kind: str = "clip", tied: bool = True) -> Path:
    """A recipe file over a fresh tower and language model in `folder`. Returns: the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tower, text = make_tower(folder / "tower", kind), make_language(folder / "llm")
    if not tied:
        _untie(text)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(vision=tower, layer=LAYERS[kind], language=text))
    return recipe


def _untie(directory: Path) -> None:
    """Give a saved language model a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(directory)
    config.tie_word_embeddings = False
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(directory)


def native_bundle(recipe: Path, *overrides: str, seed: int = 0) -> Bundle:
    """The recipe's model with every trained tensor away from its start."""
    bundle = build(load_recipe(str(recipe), list(overrides)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bundle.tuned.trainable().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    bundle.model.eval()
    return bundle


def native_directory(folder: Path, kind: str = "clip", *overrides: str) -> Path:
    """A saved model directory of `native_bundle`."""
    directory = folder / "final"
    save(native_bundle(make_native(folder, kind), *overrides), directory)
    return directory


def sample(image_id: int = IMAGE_TOKEN_ID) -> dict[str, Tensor]:
    """Two rows: two images between words, and text padded on the right."""
    image = [image_id] * TOKENS
    rows = [[7, *image, 40, *image, 41, 42, 60], [8, 9, 10, 11, 12, 13]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@torch.no_grad()
def logits_of(model: Any, image_id: int = IMAGE_TOKEN_ID) -> Tensor:
    """Logits at the unpadded positions of `sample`, (positions, vocabulary)."""
    batch = sample(image_id)
    logits: Tensor = model(**batch).logits
    return logits[batch["attention_mask"].bool()]
