"""How likely given answers are: one forward, nothing generated.

The log-likelihood of an answer is the sum over its tokens of log p(token | prompt, tokens before it), tokenised as in
training, without the tokens that end a turn. Answers of one token, letters or yes and no, are all read from the
same position, so their question is one row; longer answers take a row each, behind a common image that is read once.

Letters: b rows, s sequence, c answers, n tokens of the longest answer, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, collate
from vlmpeft.decode import Request, adapters_of, exchange_of, images_key, settle, together
from vlmpeft.errors import ModelError
from vlmpeft.images import ImageReader, ImageTransform
from vlmpeft.language import hidden_states, logits_of
from vlmpeft.prefix import can_share, part, read_prefixes, shared_length
from vlmpeft.routed import routed
from vlmpeft.routing import chosen_rows, position_ids, routing_of
from vlmpeft.template import Encoding, Exchange, TurnEncoder
from vlmpeft.vlm import VLM


@dataclass(frozen=True)
class Likelihood:
    """log_probability: of all the answer, in nats. tokens: of it. greedy: whether each is the model's first choice."""

    log_probability: float
    tokens: int
    greedy: bool


OnScored = Callable[[list[int], list[tuple[Likelihood, ...]]], None]


def likelihoods(
    model: VLM,
    encoder: TurnEncoder,
    transform: ImageTransform,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    on_batch: OnScored | None = None,
) -> list[tuple[Likelihood, ...]]:
    """How likely a model is to answer each request by each of its candidates.

    Args:
        batch_size: rows of a forward, unless one request has more; questions about the same images go together.
        on_batch: told the numbers of the requests of every batch, and what was found.

    Returns: in the order of the requests and their candidates; the same as one by one.
    Raises: ModelError M518 for a candidate without tokens.
    """
    read = ImageReader(transform)
    pairs = enumerate(zip(requests, adapters_of(len(requests)), strict=True))
    items = [_item(encoder, read, number, request, adapter) for number, (request, adapter) in pairs]
    found: dict[int, tuple[Likelihood, ...]] = {}
    settle(model)
    for chosen in _batches(items, batch_size):
        batch = [items[number] for number in chosen]
        with chosen_rows([row.number for item in batch for row in item.rows]):
            scored = _score(model, read, batch)
        found |= dict(zip(chosen, scored, strict=True))
        if on_batch:
            on_batch(chosen, scored)
    return [found[number] for number in range(len(requests))]


@dataclass(frozen=True)
class _Row:
    """What one row of a forward reads: a prompt of so many tokens, and an answer but for its last token."""

    number: int  # of the request
    request: Request
    adapter: int | None
    encoding: Encoding
    prompt: int

    @property
    def key(self) -> Any:
        """Equal where rows begin with the same images and ids."""
        return images_key(self.request), self.inputs[: shared_length(self.encoding)], self.adapter

    @property
    def inputs(self) -> tuple[int, ...]:
        return tuple(self.encoding.input_ids)

    @property
    def answers(self) -> int:
        """Positions, the last ones, that predict the answer's tokens."""
        return len(self.encoding.input_ids) - self.prompt + 1


@dataclass(frozen=True)
class _Item:
    """A request as rows: of every candidate its row, counted within the request, and its tokens."""

    rows: tuple[_Row, ...]
    candidates: tuple[tuple[int, tuple[int, ...]], ...]


def _item(encoder: TurnEncoder, read: ImageReader, number: int, request: Request, adapter: int | None) -> _Item:
    tilings = [read.tiling(image) for image in request.images]
    question = exchange_of(request).question
    rows: dict[tuple[int, ...], _Row] = {}
    candidates = []
    for text in request.candidates:
        whole = encoder.encode([Exchange(question, text)], tilings=tilings)
        start, tokens = _answer_tokens(encoder, whole, text)
        row = _Row(number, request, adapter, part(whole, 0, start + len(tokens) - 1), start)
        rows.setdefault(row.inputs, row)
        candidates.append((list(rows).index(row.inputs), tokens))
    return _Item(tuple(rows.values()), tuple(candidates))


def _answer_tokens(encoder: TurnEncoder, whole: Encoding, text: str) -> tuple[int, tuple[int, ...]]:
    """Where a conversation's answer starts, and its tokens without those that end the turn."""
    ends = [s for s in encoder.template.segments([Exchange(("q",), text)], None) if s.kind == "end"]
    supervised = [i for i, label in enumerate(whole.labels) if label != IGNORE]
    kept = supervised[: len(supervised) - sum(len(encoder.segment_ids(segment)) for segment in ends)]
    if not kept:
        raise ModelError("M518", f"the tokenizer has no token for '{text}'.")
    return kept[0], tuple(whole.input_ids[i] for i in kept)


def _batches(items: Sequence[_Item], batch_size: int) -> list[list[int]]:
    """Numbers of requests: as many as `batch_size` rows hold, at least one."""
    keys = [item.rows[0].key for item in items]
    order = together(keys, [max(len(row.inputs) for row in item.rows) for item in items])
    batches: list[list[int]] = []
    room = 0
    for number in order:
        size = len(items[number].rows)
        if size > room:
            batches.append([])
            room = max(batch_size, size)
        batches[-1].append(number)
        room -= size
    return batches


@torch.no_grad()
def _score(model: VLM, read: ImageReader, items: Sequence[_Item]) -> list[tuple[Likelihood, ...]]:
    """Of every item those of its candidates."""
    rows = [row for item in items for row in item.rows]
    longest = max(row.answers for row in rows)
    hidden = _hidden(model, read, rows)[:, -longest:]
    log_probs = logits_of(model.language, hidden).float().log_softmax(-1)  # (b, n, v)
    at, tokens, real, start = [], [], [], 0
    for item in items:
        for row, ids in item.candidates:
            padding = longest - len(ids)
            at.append(start + row)
            tokens.append([0] * padding + list(ids))
            real.append([False] * padding + [True] * len(ids))
        start += len(item.rows)
    device = log_probs.device
    given, padded = torch.tensor(tokens, device=device), ~torch.tensor(real, device=device)  # (c, n)
    place = torch.tensor(at, device=device)
    picked = log_probs[place[:, None], torch.arange(longest, device=device)[None], given]
    sums = picked.masked_fill(padded, 0).double().sum(-1).tolist()
    greedy = ((log_probs.argmax(-1)[place] == given) | padded).all(-1).tolist()
    counts = [len(ids) for item in items for _, ids in item.candidates]
    made = iter([Likelihood(*row) for row in zip(sums, counts, greedy, strict=True)])
    return [tuple(next(made) for _ in item.candidates) for item in items]


def _hidden(model: VLM, read: ImageReader, rows: Sequence[_Row]) -> Tensor:
    """Hidden states of rows, aligned at their ends. Returns: (b, s, width)."""
    keys, encodings = [row.key for row in rows], [row.encoding for row in rows]
    first = {row.key: row.request for row in reversed(rows)}
    views = {key: [view for image in request.images for view in read(image)] for key, request in first.items()}
    shared = [shared_length(encoding) for encoding in encodings]
    worth = len(first) < len(rows) and any(shared) and all(s < row.prompt for s, row in zip(shared, rows, strict=True))
    if worth and can_share(model.language, max(len(row.inputs) for row in rows)):
        return _read_shared(model, encodings, keys, [view for key in dict.fromkeys(keys) for view in views[key]])
    return _read_each(model, encodings, [view for key in keys for view in views[key]])


def _read_each(model: VLM, encodings: Sequence[Encoding], views: Sequence[Tensor]) -> Tensor:
    batch = collate(encodings, views, side="left").to(model.language.get_input_embeddings().weight.device)
    routing, embeddings = model.embed_batch(batch)
    with routed(routing):
        positions = position_ids(batch.attention_mask, None)
        return hidden_states(model.language, embeddings, batch.attention_mask, positions)


def _read_shared(model: VLM, encodings: Sequence[Encoding], keys: Sequence[Any], views: Sequence[Tensor]) -> Tensor:
    """As `_read_each`, what rows of equal keys begin with read once. Args: views: of the different keys, in order."""
    table = model.language.get_input_embeddings()
    cache, mask = read_prefixes(model, encodings, keys, views)
    rest = collate([part(e, shared_length(e), None) for e in encodings], side="left").to(table.weight.device)
    mask = torch.cat([mask, rest.attention_mask], 1)
    positions = position_ids(mask, None)[:, -rest.input_ids.shape[1] :]
    with routed(routing_of(rest.input_ids, rest.attention_mask, rest.labels, IMAGE_TOKEN_ID, ())):
        return hidden_states(model.language, table(rest.input_ids), mask, positions, cache)
