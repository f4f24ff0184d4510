"""A tiny LLaVA of transformers and the same weights assembled by us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from vlmpeft.projectors import MLPProjector
from vlmpeft.vision import load_vision
from vlmpeft.vlm import VLM

IMAGE_ID = 60  # of transformers' model; ours is batch.IMAGE_TOKEN_ID
TOKENS = 16  # of one image: 32 px in patches of 8
VOCABULARY = 64


def config() -> LlavaConfig:
    """CLIP of three layers at layer -2 without CLS, two linear layers, Llama of two blocks with an untied head."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=TOKENS,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip


def hf_llava() -> Any:
    """LlavaForConditionalGeneration with random weights, large enough for logits to differ."""
    torch.manual_seed(0)
    model: Any = Llava(config()).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def our_llava(theirs: Any, folder: Path) -> VLM:
    """The same weights: tower through a directory, projector and language model copied."""
    tower = CLIPVisionModel(theirs.config.vision_config)
    tower.load_state_dict(theirs.model.vision_tower.state_dict())
    tower.save_pretrained(folder)
    vision = load_vision(f"hf:{folder}", layer=-2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    projector = MLPProjector(16, 32)
    for ours, linear in (
        (projector[0], theirs.model.multi_modal_projector.linear_1),
        (projector[2], theirs.model.multi_modal_projector.linear_2),
    ):
        ours.load_state_dict(linear.state_dict())
    language = LlamaForCausalLM(theirs.config.text_config)
    language.model.load_state_dict(theirs.model.language_model.state_dict())
    language.lm_head.load_state_dict(theirs.lm_head.state_dict())
    model = VLM(vision, projector, language)
    model.requires_grad_(False)
    return model.eval()
