"""Tiny LLaVA models of transformers as directories to start from: random weights, processor and tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file

SIZE, PATCH, TOKENS = 32, 8, 16
PINPOINTS = [[32, 64], [64, 32], [64, 64]]  # heights and widths
RECIPE = """
init: hf:{model}
template: chatml
tuners: {{lora: {{kind: lora, r: 4}}, projector: {{kind: full, part: projector}}}}
optim: {{lr: 1e-2, steps: 2, warmup: 0}}
batch: {{size: 4, micro: 4}}
run: {{precision: fp32, device: cpu}}
"""


def make_config(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """LlavaConfig ("clip", "siglip") or LlavaNextConfig ("next") of three encoder and two language layers."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = hf.SiglipVisionConfig if kind == "siglip" else hf.CLIPVisionConfig
    text = hf.LlamaConfig(
        vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    options: dict[str, Any] = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    options |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"} if kind == "siglip" else {}
    options |= {"image_grid_pinpoints": PINPOINTS} if kind == "next" else {}
    make: Any = hf.LlavaNextConfig if kind == "next" else hf.LlavaConfig
    return make(
        vision_config=tower(**shape, image_size=SIZE, patch_size=PATCH), text_config=text,
        image_seq_length=TOKENS, **(options | changes),
    )  # fmt: skip


def make_start(folder: Path, kind: str = "clip", names: str = "present", **changes: Any) -> Path:
    """A model with its processor as transformers saves it.

    Args: names: of the tensors: as `save_pretrained` writes them ("present"), those of the hub's older files ("hub"),
        or the model's own ("memory"). changes: of the configuration.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    next_ = kind == "next"
    kinds: Any = hf.LlavaNextForConditionalGeneration if next_ else hf.LlavaForConditionalGeneration
    model: Any = kinds(make_config(kind, tokenizer, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.save_pretrained(folder)
    common = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    images: Any = hf.LlavaImageProcessor(**common)
    if next_:
        images = hf.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **common)
    make: Any = hf.LlavaNextProcessor if next_ else hf.LlavaProcessor
    make(
        images, tokenizer, patch_size=PATCH, num_additional_image_tokens=int(kind != "siglip"),
        vision_feature_select_strategy="full" if kind == "siglip" else "default",
    ).save_pretrained(folder)  # fmt: skip
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if names == "hub":
        tensors = {
            re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", k): v for k, v in tensors.items()
        }
    elif names == "memory":
        tensors = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def make_recipe(folder: Path, model: Path) -> Path:
    """A recipe file that names the start and nothing else of the model."""
    path = folder / "start.yaml"
    path.write_text(RECIPE.format(model=model))
    return path
