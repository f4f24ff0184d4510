"""Tiny Hugging Face VLMs with random weights as directories, processor and chat template included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from conftest import make_tokenizer
from tiny_hf import MODELS

SIZE = {"shortest_edge": 16}
CROP = {"height": 16, "width": 16}
CHAT = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %} {{ part['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>"]
SPECIAL += ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]


def chat(image: str) -> str:
    """The template of these models around their own mark of an image."""
    return CHAT.replace("IMAGE", image)


def _llava(tokenizer: Any) -> Any:
    images = hf.CLIPImageProcessor(size=SIZE, crop_size=CROP)
    return hf.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>\\n"),
    )  # fmt: skip


def _llava_next(tokenizer: Any) -> Any:
    images = hf.LlavaNextImageProcessor(size=SIZE, crop_size=CROP, image_grid_pinpoints=[[16, 32], [32, 16]])
    return hf.LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>\\n"),
    )  # fmt: skip


def _idefics(tokenizer: Any) -> Any:
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return hf.Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=chat("<image>"))


def _qwen(tokenizer: Any) -> Any:
    sizes = {"patch_size": 8, "merge_size": 2, "min_pixels": 256, "max_pixels": 1024}
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(**sizes), tokenizer, hf.Qwen2VLVideoProcessor(**sizes), chat_template=chat(mark)
    )


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "llava": _llava,
    "llava next": _llava_next,
    "idefics 3": _idefics,
    "smolvlm": _idefics,  # its own processor, of the same kind, needs one more package for videos
    "qwen2-vl": _qwen,
}


def make_hf(folder: Path, kind: str) -> Path:
    """A directory of a model whose greedy texts vary with image and question."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    processor = PROCESSORS[kind](tokenizer)
    made = MODELS[kind]()
    config, mark = made.config, "<|image_pad|>" if "qwen" in kind else "<image>"
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings, text.eos_token_id = len(tokenizer), 512, tokenizer.eos_token_id
    config.image_token_id = tokenizer.convert_tokens_to_ids(mark)
    if "qwen" in kind:
        names = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "video": "<|video_pad|>"}
        for name, token in names.items():
            setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    if kind == "llava next":
        config.image_grid_pinpoints = [[16, 32], [32, 16]]
    torch.manual_seed(4)
    model = type(made)(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
