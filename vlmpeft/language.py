"""Any causal language model of transformers: a local directory, a hub id, or a GGUF file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.errors import ModelError
from vlmpeft.sources import resolve, unreachable


def load_language(name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> tuple[Any, Any]:
    """Load a frozen causal LM and its tokenizer.

    Args:
        name: directory, hub id, `*.gguf` file, or `package:NAME/PATH` of one of them.
        dtype: of the weights.
        attention: transformers' attention implementation.

    Returns: (model, tokenizer), the model frozen and in eval mode.
    Raises: EnvironmentFault E420 if it cannot be had; ModelError M510 for a tokenizer without an end token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve(name)
    directory = str(_converted(Path(source))) if source.endswith(".gguf") else source
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(name, error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError("M510", f"the tokenizer of {name} has no eos token, so answers would never end.", "set eos_token in its tokenizer_config.json.")
    return model.requires_grad_(False).eval(), tokenizer


def empty_language(name: str) -> Any:
    """The architecture of a causal LM on the meta device: shapes and counts without weights, from its config.json alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(name, error) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _converted(gguf: Path) -> Path:
    """A dequantised copy of a GGUF model as a safetensors directory, made once and kept in the cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not gguf.is_file():
        raise ModelError("M540", f"no GGUF file {gguf}.", "check language.name.")
    target = fs.cache_dir() / f"language-{gguf.stem}-{fs.sha256(gguf)[:12]}"
    if (target / "config.json").is_file():
        return target
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config = loaded.config
    del config.quantization_config  # the copy holds plain weights; the entry would make them load as GGUF
    plain = AutoModelForCausalLM.from_config(config)  # the loaded model itself refuses to be saved as anything but GGUF
    plain.load_state_dict(loaded.state_dict())
    with fs.new_directory(target) as directory:
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return target


def decoder_of(language: Any) -> nn.Module:
    """The part of a causal LM below its head: ids or embeddings -> hidden states."""
    return language.get_decoder()


def logits_of(language: Any, hidden: Tensor) -> Tensor:
    """Head of a causal LM with the scaling its config declares. Args: hidden (..., d). Returns: (..., vocabulary)."""
    logits: Tensor = language.get_output_embeddings()(hidden)
    config = language.config
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


def fingerprint(module: nn.Module, samples: int = 64) -> str:
    """Identify weights by content: names, shapes and evenly spaced values, equal for the fp32 and the bf16 copy.

    Args: samples: values read from each tensor.
    Returns: 16 hex digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        index = torch.linspace(0, max(flat.numel() - 1, 0), min(samples, flat.numel())).long()
        values = flat[index.to(flat.device)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
