"""Tiny Hugging Face VLMs with random weights, one of each layout that `parts_of` knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def _llava(kind: str, **options: Any) -> Any:
    config = getattr(hf, f"{kind}Config")(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_index=60, **options
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _siglip(kind: str, text: Any, **options: Any) -> Any:
    config = getattr(hf, f"{kind}Config")(
        vision_config=hf.SiglipVisionConfig(**VISION), text_config=text, image_token_index=60, **options
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _idefics(kind: str) -> Any:
    config = getattr(hf, f"{kind}Config")(
        vision_config={"model_type": f"{kind.lower()}_vision", **VISION}, text_config=hf.LlamaConfig(**TEXT),
        image_token_id=60, scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _qwen(kind: str, vision: dict[str, Any]) -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision, image_token_id=60)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _internvl() -> Any:
    vision = hf.InternVLVisionConfig(**{**VISION, "image_size": [16, 16], "patch_size": [8, 8]})
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=60)
    )


def _mistral3() -> Any:
    vision = hf.PixtralVisionConfig(**{**VISION, "head_dim": 8})
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(vision_config=vision, text_config=hf.MistralConfig(**TEXT), image_token_index=60)
    )


def _blip2() -> Any:
    text = hf.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64,
    )  # fmt: skip
    former = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "encoder_hidden_size": 16, "vocab_size": 64}  # fmt: skip
    config = hf.Blip2Config(vision_config=VISION, qformer_config=former, text_config=text, image_token_index=60)
    return hf.Blip2ForConditionalGeneration(config)


QWEN2 = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
QWEN25 = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 16,
}
QWEN3 = {**QWEN25, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}

MODELS: dict[str, Callable[[], Any]] = {
    "llava": lambda: _llava("Llava"),
    "vip llava": lambda: _llava("VipLlava", vision_feature_layers=[-2, -1]),
    "llava next": lambda: _llava("LlavaNext", image_grid_pinpoints=[[16, 32]]),
    "llava onevision": lambda: _siglip("LlavaOnevision", hf.Qwen2Config(**TEXT), image_grid_pinpoints=[[16, 32]]),
    "paligemma": lambda: _siglip("PaliGemma", hf.GemmaConfig(**TEXT), projection_dim=16),
    "gemma 3": lambda: _siglip("Gemma3", hf.Gemma3TextConfig(**TEXT), mm_tokens_per_image=4),
    "aya vision": lambda: _siglip("AyaVision", hf.CohereConfig(**TEXT)),
    "internvl": _internvl,
    "mistral 3": _mistral3,
    "idefics 3": lambda: _idefics("Idefics3"),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "qwen2-vl": lambda: _qwen("Qwen2VL", QWEN2),
    "qwen2.5-vl": lambda: _qwen("Qwen2_5_VL", QWEN25),
    "qwen3-vl": lambda: _qwen("Qwen3VL", QWEN3),
    "blip-2": _blip2,
}
