"""Prompt tuning (arXiv:2104.08691): trained embeddings before the sequence, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.sources import hub_or_cache, resolve, unreachable
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.peft_folder import check_settings, read_config
from vlmpeft.tuners.virtual import VirtualTokens, decoder_with, embedding_like, token_table

NAME = "prompt_tuning"  # of the module inside the language model, and of the tuner
Init = Literal["random", "text"]


class Prompts(VirtualTokens):
    """Embeddings (m, d) before the sequence."""

    def __init__(self, start: Tensor, parts: Parts) -> None:
        super().__init__(decoder_with(parts))
        self.prompt_embeddings = nn.Parameter(start)

    def prompts(self) -> Tensor | None:
        """See `VirtualTokens.prompts`."""
        return self.prompt_embeddings


@TUNERS.register(NAME)
@dataclass(frozen=True)
class PromptTuning:
    """Embeddings of `tokens` virtual tokens at positions 0 ... tokens - 1, before everything else of a row.

    They carry no loss, and no logits are given for them. As in peft 0.21 the sequence starts at position `tokens`.
    There given positions are ignored, so that a row padded on the left starts later, by its padding; here it does not.

    Args:
        tokens: m.
        init: "random" (like the token embeddings: their mean and spread) or "text".
        init_text: its tokens' embeddings are the start, repeated or cut to `tokens`, as peft does.
        tokenizer: directory or hub id of the tokenizer for `init_text`; None for the language model's own.
        part: "language", whose input they are.
        lr: learning rate of its own; 3e-2 as in peft's guide to prompt tuning: a few hundred numbers must go far.
    """

    kind: ClassVar[str] = NAME
    tokens: int = 20
    init: Init = "random"
    init_text: str | None = None
    tokenizer: str | None = None
    part: str = "language"
    lr: float | None = 3e-2

    def __post_init__(self) -> None:
        check(self.tokens >= 1, "prompt_tuning.tokens", self.tokens, "an integer of at least 1")
        check(self.init in get_args(Init), "prompt_tuning.init", self.init, "one of " + ", ".join(get_args(Init)))
        text = "a text with init=text, and null without"
        check((self.init == "text") == bool(self.init_text), "prompt_tuning.init_text", self.init_text, text)
        check(self.part == "language", "prompt_tuning.part", self.part, "language, whose input they are")
        check(self.lr is None or 0 < self.lr <= 1, "prompt_tuning.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Put the embeddings before the decoder. Returns: them, by name. Raises: ModelError M567, M569."""
        start = self._from_text(parts) if self.init_text else embedding_like(parts, self.tokens)
        return Prompts(start, parts).put_into(model, parts, NAME)

    @torch.no_grad()
    def _from_text(self, parts: Parts) -> Tensor:
        """(m, d) fp32 embeddings of the tokens of `init_text`."""
        ids = _token_ids(self.tokenizer or _name(parts.language), self.init_text or "")
        chosen = list(itertools.islice(itertools.cycle(ids), self.tokens))
        table: Any = token_table(parts)
        found: Tensor = table(torch.tensor(chosen, device=table.weight.device))
        return found.float().clone()

    @property
    def in_peft(self) -> bool:
        """Always: how they started does not matter."""
        return True

    def check_peft(self, folder: Path) -> None:
        """See `PeftForm.check_peft`."""
        check_settings(folder, "PROMPT_TUNING", {"num_virtual_tokens": self.tokens})

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`; peft reads the width off the base."""
        return {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "num_virtual_tokens": self.tokens,
            "prompt_tuning_init": "RANDOM",
            "inference_mode": True,
        }


def prompt_from_peft(directory: Path) -> PromptTuning:
    """The PromptTuning of a PEFT folder; `Tuned.load` then reads its weights. Raises: ModelError M502, M554."""
    config = read_config(Path(directory), "PROMPT_TUNING", numbers=("num_virtual_tokens",))
    return PromptTuning(int(config["num_virtual_tokens"]))


def _name(language: nn.Module) -> str:
    """Where a language model was loaded from. Raises: ModelError M569 if it does not say."""
    name = str(getattr(getattr(language, "config", None), "_name_or_path", "") or "")
    if not name:
        message = "prompt_tuning.init=text needs a tokenizer, and the language model does not say which it has."
        raise ModelError("M569", message, "give prompt_tuning.tokenizer.")
    return name


def _token_ids(name: str, text: str) -> list[int]:
    """Ids of a text. Raises: EnvironmentFault E420, ModelError M547 without the tokenizer; M569 without a token."""
    from transformers import AutoTokenizer

    source = resolve(name)
    try:
        with hub_or_cache():
            tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise ModelError("M569", f"prompt_tuning.init_text={text!r} has no token.", "give a longer text.")
    return ids
