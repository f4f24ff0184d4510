"""Any causal language model of transformers: a local directory, a hub id, or a GGUF file."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.errors import ModelError
from vlmpeft.llava_layout import HALVES, KINDS
from vlmpeft.routed import cache_name
from vlmpeft.sources import hub_or_cache, quiet, require_complete, resolve, unreachable
from vlmpeft.tokens import fit_tokenizer


def load_language(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str = "auto", eos: str | None = None
) -> tuple[Any, Any]:
    """Load a frozen causal LM and its tokenizer.

    Args:
        name: directory, hub id, `*.gguf` file, or `package:NAME/PATH` of one of them.
        dtype: of the weights.
        attention: transformers' attention implementation; "auto" is sdpa where the architecture has it.
        eos: the token that ends answers; None for the tokenizer's own.

    Returns: (model, tokenizer), the model frozen and in eval mode.
    Raises: EnvironmentFault E420 if it cannot be had; ModelError M510 for a tokenizer without an end token, M548 for
        weights that lack a tensor, M511 for a head we cannot repeat or tokens that have no row.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve(name)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if attention != "auto":
        options["attn_implementation"] = attention
    try:
        with hub_or_cache():
            directory = str(_converted(Path(source))) if source.endswith(".gguf") else source
            half = _half(directory)
            load: Any = AutoModelForCausalLM.from_pretrained
            with quiet() if half else contextlib.nullcontext():
                model, info = load(directory, output_loading_info=True, **options, **half)
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error
    require_complete(name, info)
    fit_tokenizer(tokenizer, name, model.get_input_embeddings().weight.shape[0], eos)
    model.requires_grad_(False).eval()
    check_head(model, name)
    return model, tokenizer


def _half(source: str) -> dict[str, Any]:
    """What makes the language model out of a LLaVA of transformers; nothing for a language model by itself."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type not in KINDS:
        return {}
    return {"config": config.text_config, "key_mapping": HALVES["language"]}


def load_tokenizer(name: str, eos: str | None = None) -> Any:
    """The tokenizer of a causal LM without its weights. Args: as `load_language`. Raises: EnvironmentFault E420."""
    from transformers import AutoTokenizer

    source = resolve(name)
    if source.endswith(".gguf"):
        source = str(_converted(Path(source)))
    try:
        with hub_or_cache():
            tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


def empty_language(name: str) -> Any:
    """The architecture of a causal LM on the meta device: shapes without weights, from its config.json alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve(name)
    if source.endswith(".gguf"):
        source = str(_converted(Path(source)))
    try:
        with hub_or_cache():
            config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error
    config = config.text_config if config.model_type in KINDS else config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _converted(gguf: Path) -> Path:
    """A dequantised copy of a GGUF model as a safetensors directory, made once and kept in the cache."""
    if not gguf.is_file():
        raise ModelError("M540", f"no GGUF file {gguf}.", "check language.name.")
    target = fs.cache_dir() / f"language-{gguf.stem}-{fs.sha256(gguf)[:12]}"
    if (target / "config.json").is_file():
        return target
    loaded, tokenizer = _read_gguf(gguf)
    plain = _without_quantisation(loaded)
    with fs.new_directory(target) as directory:
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return target


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, options = str(gguf.parent), {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(folder, dtype=torch.float32, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the reader of a damaged file raises many kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        fix = "fetch it again, or give a directory."
        raise ModelError("M546", f"{gguf} cannot be read as GGUF: {reason}", fix) from error
    require_complete(str(gguf), info)
    return model, tokenizer


def _without_quantisation(loaded: Any) -> Any:
    """The same weights in a model that may be saved: one loaded from GGUF refuses to be written as anything else."""
    from transformers import AutoModelForCausalLM

    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the copy holds plain weights; the entry would make them load as GGUF
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    return plain


def decoder_of(language: Any) -> nn.Module:
    """The part of a causal LM below its head: ids or embeddings -> hidden states."""
    return language.get_decoder()


def width_of(language: Any) -> int:
    """Width of the token embeddings, which is not the hidden size in every model (OPT-350m)."""
    return int(language.get_input_embeddings().weight.shape[1])


def takes_positions(language: Any) -> bool:
    """Whether positions can be given, so that a token need not stand where its position says."""
    return "position_ids" in inspect.signature(decoder_of(language).forward).parameters


def hidden_states(
    language: Any, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: Any | None = None
) -> Tensor:
    """Run a causal LM below its head. Letters: b batch, s sequence, t past and present tokens, d width.

    Args:
        embeddings: (b, s, d).
        mask: (b, t) of real tokens, or (b, 1, s, t) added to the attention scores.
        positions: (b, s).
        cache: keys and values of the past; extended in place.

    Returns: (b, s, d).
    Raises: ModelError M516 for an additive mask where the model computes positions itself.
    """
    options: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        options[cache_name(decoder_of(language).forward) or "past_key_values"] = cache
    if takes_positions(language):
        options["position_ids"] = positions
    elif mask.ndim == 4:
        alone = f"{type(language).__name__} computes positions itself, so turns cannot be independent."
        raise ModelError("M516", alone, "set turns=chat.")
    out: Tensor = decoder_of(language)(inputs_embeds=embeddings, attention_mask=mask, **options).last_hidden_state
    return out


def logits_of(language: Any, hidden: Tensor) -> Tensor:
    """Head of a causal LM with the scaling its config declares. Args: hidden (..., d). Returns: (..., vocabulary)."""
    logits: Tensor = language.get_output_embeddings()(hidden)
    config = language.config
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if factor := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_head(language: Any, name: str) -> None:
    """Prove on two tokens that `decoder_of` and `logits_of` together are the model.

    Raises: ModelError M511 if they are not: the loss would be of another model.
    """
    ids = torch.tensor([[0, 1]], device=language.get_input_embeddings().weight.device)
    expected = language(input_ids=ids, use_cache=False).logits.float()
    hidden = decoder_of(language)(input_ids=ids, use_cache=False).last_hidden_state
    found = logits_of(language, hidden).float()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
        odd = f"{type(language).__name__} ({name}) does something to its logits that vlmpeft does not know."
        raise ModelError("M511", odd, "report the architecture, or use another language model.")


def fingerprint(module: nn.Module, samples: int = 64) -> str:
    """Identify weights by content: names, shapes and evenly spaced values, equal for the fp32 and the bf16 copy.

    Args: samples: values read from each tensor.
    Returns: 16 hex digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        count = min(samples, flat.numel())
        index = torch.arange(count) * max(flat.numel() - 1, 0) // max(count - 1, 1)  # in integers: exact at any size
        values = flat[index.to(flat.device)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
