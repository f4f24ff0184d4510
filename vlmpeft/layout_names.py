"""Layouts by the names recipes know them by, and what each needs of a tokenizer."""

from __future__ import annotations

from typing import Any, Final

from vlmpeft.errors import ModelError, nearest
from vlmpeft.layout_tokenizer import TokenizerTemplate
from vlmpeft.layouts import LLAMA_2_SYSTEM, ChatML, Instruct, Plain, Template, Vicuna, WholeVicuna

TEMPLATES: Final = (
    "plain", "vicuna_v1", "vicuna_v1_legacy", "llama_2", "mistral", "phi", "gemma", "chatml", "tokenizer",
)  # fmt: skip


def template_of(name: str, tokenizer: Any) -> Template:
    """The template called `name`.

    Raises: ModelError M509 for an unknown name, M510 if the tokenizer does not fit, with the templates that do.
    """
    if name not in TEMPLATES:
        raise ModelError("M509", f"no template '{name}'{nearest(name, TEMPLATES)}")
    if misfit := _misfit(name, tokenizer):
        fitting = [other for other in TEMPLATES if other != "plain" and not _misfit(other, tokenizer)]
        fix = f"use template={' or '.join(fitting)}." if fitting else "set language.eos=TOKEN, then template=vicuna_v1."
        raise ModelError("M510", f"template={name}, but the tokenizer has {misfit}.", fix)
    match name:
        case "plain":
            return Plain()
        case "vicuna_v1":
            return Vicuna(tokenizer.eos_token)
        case "llama_2":
            return Instruct(tokenizer.eos_token, tokenizer.bos_token or "", LLAMA_2_SYSTEM)
        case "mistral":
            return Instruct(tokenizer.eos_token)
        case "chatml":
            return ChatML()
        case "tokenizer":
            return TokenizerTemplate(tokenizer)
    return WholeVicuna(tokenizer.eos_token)  # vicuna_v1_legacy, phi, gemma: one text, each model's own eos


def _misfit(name: str, tokenizer: Any) -> str | None:
    """What is in the way of a template: something missing, or a layout mark that is a token of its own."""
    added = tokenizer.get_added_vocab()
    if name == "tokenizer":
        return None if tokenizer.chat_template else "no chat template"
    if name == "chatml":
        lacks = [token for token in ("<|im_start|>", "<|im_end|>") if token not in added]
        return f"no special token {lacks[0]}" if lacks else None
    if name != "plain" and not tokenizer.eos_token:
        return "no eos token, with which answers end"
    if name in ("llama_2", "mistral") and "[INST]" in added:
        return "a special token [INST], which this template writes as text"
    return None
