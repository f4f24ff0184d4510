"""Rows of new tokens beside an embedding and a head whose own rows stay as they are.

Letters: b batch, s sequence, d width, v old vocabulary, n new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check


class NewTokenEmbedding(nn.Module):
    """An embedding (v, d) that looks the ids first ... first + n - 1 up in rows (n, d) of its own."""

    def __init__(self, base: nn.Embedding, first: int, rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer, self.first, self.rows = base, first, rows
        self.scale = float(getattr(base, "scalar_embed_scale", 1.0))  # Gemma's embedding multiplies what it looks up

    @property
    def weight(self) -> Tensor:
        """The old rows: width, dtype and device of the embedding."""
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(b, s) -> (b, s, d)."""
        new = (ids >= self.first) & (ids < self.first + len(self.rows))
        old: Tensor = self.base_layer(ids.masked_fill(new, 0))
        rows = F.embedding((ids - self.first).masked_fill(~new, 0), self.rows * self.scale)
        return torch.where(new[..., None], rows.to(old.dtype), old)


class NewTokenHead(nn.Module):
    """A head d -> v whose logits of the ids first ... first + n - 1 come from rows (n, d) and a bias of their own."""

    def __init__(self, base: nn.Linear, first: int, rows: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.base_layer, self.first, self.rows, self.bias = base, first, rows, bias

    @property
    def weight(self) -> Tensor:
        """The old rows."""
        return self.base_layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., max(v, first + n))."""
        old: Tensor = self.base_layer(hidden)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        new = F.linear(hidden, self.rows.to(hidden.dtype), bias).to(old.dtype)
        return torch.cat([old[..., : self.first], new, old[..., self.first + len(self.rows) :]], -1)


def grow(language: Any, first: int, pieces: Sequence[Sequence[int]]) -> None:
    """Give a causal LM rows for new tokens, frozen and in fp32, tied where its embedding and head are.

    Args:
        first: id of the first new token; inside the matrices where they have rows to spare, never beyond their end.
        pieces: for each new token the old ids whose mean it starts as; none for the mean of all.
    """
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    rows = _mean_rows(embedding.weight, first, pieces)
    head_rows = rows if head.weight is embedding.weight else _mean_rows(head.weight, first, pieces)
    bias = None if head.bias is None else _mean_rows(head.bias, first, pieces)
    language.set_input_embeddings(NewTokenEmbedding(embedding, first, rows))
    language.set_output_embeddings(NewTokenHead(head, first, head_rows, bias))
    config = language.config.get_text_config()
    config.vocab_size = max(config.vocab_size, first + len(pieces))


@torch.no_grad()
def _mean_rows(weight: Tensor, first: int, pieces: Sequence[Sequence[int]]) -> nn.Parameter:
    """(v, d) or (v,) -> means of rows, (n, d) or (n,)."""
    everything = weight[:first].mean(0, dtype=torch.float32)
    rows = [weight[list(ids)].mean(0, dtype=torch.float32) if ids else everything for ids in pieces]
    return nn.Parameter(torch.stack(rows), requires_grad=False)


@TUNERS.register("token_rows")
@dataclass(frozen=True)
class TokenRows:
    """Train the rows of new tokens (`tokens.add`), of embedding and head, and nothing else of either.

    Args: lr: learning rate of their own.
    """

    kind: ClassVar[str] = "token_rows"
    lr: float | None = None

    def __post_init__(self) -> None:
        check(self.lr is None or 0 < self.lr <= 1, "token_rows.lr", self.lr, "a number in (0, 1]")

    @property
    def part(self) -> str:
        """Where the rows are."""
        return "language"

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Find the rows. Returns: them by name, tied ones once. Raises: ModelError M550 if the model has none."""
        holders = [m for m in model.modules() if isinstance(m, NewTokenEmbedding | NewTokenHead)]
        rows = {id(p) for holder in holders for p in holder.parameters(recurse=False)}
        if not rows:
            raise ModelError("M550", "the language model has no new tokens to train.", "set tokens.add=[...].")
        return {name: p for name, p in model.named_parameters() if id(p) in rows}
