"""Where images, text and answers are in a batch, computed once a forward. Letters: b batch, s sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmpeft.batch import IGNORE

_ADAPTER: ContextVar[Tensor | None] = ContextVar("adapter", default=None)


def adapter_of_rows() -> Tensor | None:
    """(b,) index of the adapter of every row of the forwards that run now; None if all rows use the same."""
    return _ADAPTER.get()


@contextlib.contextmanager
def rows_with(adapter: Tensor | None) -> Iterator[None]:
    """Forwards inside a `with` block use an adapter of its own for every row. Args: adapter: (b,), on the CPU."""
    token = _ADAPTER.set(adapter)
    try:
        yield
    finally:
        _ADAPTER.reset(token)


@contextlib.contextmanager
def chosen_rows(numbers: Sequence[int]) -> Iterator[None]:
    """Of rows that have adapters of their own, only these come inside a `with` block, in this order."""
    adapter = adapter_of_rows()
    with rows_with(None if adapter is None else adapter[list(numbers)]):
        yield


@dataclass(frozen=True)
class Routing:
    """Boolean masks (b, s) that every modality-aware component reads instead of deriving positions again.

    Args:
        visual: image placeholders.
        text: all other real tokens.
        answer: tokens the assistant wrote (labels != IGNORE); None without labels.
        predict: positions whose next token is an answer token, for the loss; None without labels.
        adapter: (b,) int64 index of the adapter a row uses, on the CPU; None where all rows use the same.
        instruction: what the user says, of the text; None where turns are not known.
        images: tokens of every image (or view, where views stay apart) of the batch in order, where the host knows.
        prompts: virtual tokens at the input; the masks begin with them, as neither image nor text.
        prefix: virtual tokens that are keys and values only: every attention has their keys before those of the masks.
        memo: what acts on this forward keeps here what it computes once for all layers.
    """

    visual: Tensor
    text: Tensor
    answer: Tensor | None = None
    predict: Tensor | None = None
    adapter: Tensor | None = field(default_factory=adapter_of_rows)
    instruction: Tensor | None = None
    images: tuple[int, ...] | None = None
    prompts: int = 0
    prefix: int = 0
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def rows_of(self, adapter: int) -> Rows | None:
        """The rows that use an adapter, found once a forward; None if none does."""
        if self.adapter is None:
            return None
        if ("rows", adapter) not in self.memo:
            numbers = (self.adapter == adapter).nonzero().squeeze(1)
            self.memo["rows", adapter] = self._rows(numbers) if len(numbers) else None
        found: Rows | None = self.memo["rows", adapter]
        return found

    def _rows(self, numbers: Tensor) -> Rows:
        at = numbers.to(self.visual.device)
        masks = (self.visual, self.text, self.answer, self.predict)
        visual, text, answer, predict = (None if mask is None else mask[at] for mask in masks)
        instruction = None if self.instruction is None else self.instruction[at]
        adapter = None if self.adapter is None else self.adapter[numbers]
        routing = Routing(
            visual, text, answer, predict, adapter, instruction,  # type: ignore[arg-type]
            prompts=self.prompts, prefix=self.prefix,
        )  # fmt: skip
        return Rows(at, routing)


class Rows(NamedTuple):
    """Some rows of a batch: their numbers (n,), and the routing of a batch of these alone."""

    numbers: Tensor
    routing: Routing


def routing_of(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None,
    image_token_id: int,
    images: tuple[int, ...] | None = None,
) -> Routing:
    """The routing of a batch. Args: input_ids, attention_mask, labels: (b, s); images: see `Routing`."""
    real = attention_mask.bool()
    visual = (input_ids == image_token_id) & real
    if labels is None:
        return Routing(visual, real & ~visual, images=images)
    answer = (labels != IGNORE) & real
    predict = torch.zeros_like(answer)
    predict[:, :-1] = answer[:, 1:]
    return Routing(visual, real & ~visual, answer, predict, images=images)


def text_routing(attention_mask: Tensor, answer: bool) -> Routing:
    """The routing of tokens (b, s) without an image: of a prompt, or of the answer a model has written itself."""
    real = attention_mask.bool()
    nowhere = torch.zeros_like(real)
    return Routing(nowhere, real, real if answer else nowhere, images=())


def position_ids(attention_mask: Tensor, turns: Tensor | None) -> Tensor:
    """Positions that count real tokens only; each independent turn continues where the shared prefix ends.

    Args: attention_mask (b, s) bool; turns (b, s) or None, see `Batch.turns`.
    Returns: (b, s) int64, 0 at padding.
    """
    real = attention_mask.long()
    positions = real.cumsum(-1) - 1
    if turns is not None:
        shared = ((turns == 0) & attention_mask).sum(-1, keepdim=True)
        same = (turns[:, :, None] == turns[:, None, :]) & attention_mask[:, None, :]
        within = same.tril().sum(-1) - 1  # (b, s) rank of a token inside its own turn
        positions = torch.where(turns > 0, shared + within, positions)
    return positions.clamp_min(0)


def turn_mask(attention_mask: Tensor, turns: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive causal mask under which a turn sees the shared prefix and itself.

    Args: attention_mask (b, s) bool; turns (b, s); dtype of the attention scores.
    Returns: (b, 1, s, s), 0 where attention is allowed, the most negative number elsewhere.
    """
    size = turns.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=turns.device).tril()
    keys = turns[:, None, :]
    allowed = causal & ((keys == 0) | (keys == turns[:, :, None])) & attention_mask[:, None, :]
    allowed = allowed | torch.eye(size, dtype=torch.bool, device=turns.device)  # a padded row sees itself: no NaN
    bias = torch.zeros(allowed.shape, dtype=dtype, device=turns.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
