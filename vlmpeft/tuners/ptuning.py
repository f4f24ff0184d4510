"""P-tuning v2 (arXiv:2110.07602): a prefix in every block trained without an MLP, and prompts at the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.deep_prefix import DeepPrefix, PlainPrefix, key_shape
from vlmpeft.tuners.virtual import embedding_like

NAME = "ptuning_v2"  # of the module inside the language model, and of the tuner


class DeepPrompts(DeepPrefix):
    """A prefix in every block and prompts (m, d) between it and the sequence."""

    def __init__(self, prefix: PlainPrefix, prompts: Tensor, parts: Parts) -> None:
        super().__init__(prefix, parts)
        self.input_prompts = nn.Parameter(prompts)

    def prompts(self) -> Tensor | None:
        """See `VirtualTokens.prompts`."""
        return self.input_prompts


@TUNERS.register(NAME)
@dataclass(frozen=True)
class PTuningV2:
    """Keys and values of `tokens` virtual tokens in every block, and as many embeddings behind them at the input.

    The sequence is [prefix, prompts, tokens]: the prompts stand at positions n ... n + m - 1 and see the prefix, each
    other causally, and nothing else. `peft` has no such method.

    Args:
        tokens: n of the prefix.
        prompts: m at the input; None is as many as `tokens`.
        part: "language", whose blocks get the prefix.
        lr: learning rate of its own; 5e-3 as in the paper's run_script/run_rte_roberta.sh.
    """

    kind: ClassVar[str] = NAME
    tokens: int = 20
    prompts: int | None = None
    part: str = "language"
    lr: float | None = 5e-3

    def __post_init__(self) -> None:
        check(self.tokens >= 1, "ptuning_v2.tokens", self.tokens, "an integer of at least 1")
        check(self.prompts is None or self.prompts >= 1, "ptuning_v2.prompts", self.prompts, "at least 1, or null")
        check(self.part == "language", "ptuning_v2.part", self.part, "language, whose blocks get the prefix")
        check(self.lr is None or 0 < self.lr <= 1, "ptuning_v2.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Put both before the blocks. Returns: their parameters, by name. Raises: ModelError M567."""
        prompts = embedding_like(parts, self.tokens if self.prompts is None else self.prompts)
        return DeepPrompts(PlainPrefix(self.tokens, *key_shape(parts)), prompts, parts).put_into(model, parts, NAME)
