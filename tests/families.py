"""Tiny language models with random weights, one a family, as directories with a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T
from conftest import make_tokenizer

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**TINY, "intermediate_size": 48, "initializer_range": 0.2}
GQA = {**MLP, "num_key_value_heads": 2}
LLAMA_LAYERS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")

FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": lambda v: T.LlamaForCausalLM(T.LlamaConfig(**v, **GQA)),
    "smollm": lambda v: T.LlamaForCausalLM(T.LlamaConfig(**v, **GQA, tie_word_embeddings=True)),
    "smollm3": lambda v: T.SmolLM3ForCausalLM(T.SmolLM3Config(**v, **GQA)),
    "qwen2": lambda v: T.Qwen2ForCausalLM(T.Qwen2Config(**v, **GQA)),
    "qwen3": lambda v: T.Qwen3ForCausalLM(T.Qwen3Config(**v, **GQA, head_dim=8)),
    "mistral": lambda v: T.MistralForCausalLM(T.MistralConfig(**v, **GQA)),
    "phi": lambda v: T.PhiForCausalLM(T.PhiConfig(**v, **MLP)),
    "phi3": lambda v: T.Phi3ForCausalLM(T.Phi3Config(**v, **GQA)),
    "gemma": lambda v: T.GemmaForCausalLM(T.GemmaConfig(**v, **GQA, head_dim=8)),
    "gemma2": lambda v: T.Gemma2ForCausalLM(T.Gemma2Config(**v, **GQA, head_dim=8)),
    "stablelm": lambda v: T.StableLmForCausalLM(T.StableLmConfig(**v, **GQA)),
    "gpt_neox": lambda v: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**v, **MLP)),
    "opt": lambda v: T.OPTForCausalLM(T.OPTConfig(**v, **TINY, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2)),
    "gpt2": lambda v: T.GPT2LMHeadModel(T.GPT2Config(**v, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)),
}
"""Qwen2.5 is Qwen2, SmolLM2 is SmolLM: the same classes."""

LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "smollm", "smollm3", "qwen2", "qwen3", "mistral", "stablelm"), LLAMA_LAYERS),
    **dict.fromkeys(("gemma", "gemma2"), LLAMA_LAYERS),
    "phi": ("dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"),
    "phi3": ("down_proj", "gate_up_proj", "o_proj", "qkv_proj"),
    "gpt_neox": ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"),
    "opt": ("fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"),
    "gpt2": (),  # its layers are transformers' Conv1D
}
"""The linear layers of a block, as papers and PEFT's configurations name them."""


def write_family(kind: str, directory: Path) -> Path:
    """A model of a family with a tokenizer, written as transformers does."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    model = FAMILIES[kind]({"vocab_size": len(tokenizer), **ids})
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
