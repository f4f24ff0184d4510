"""How likely given answers are: one forward a batch, images and beginnings that answers share read once.

Letters: b rows, s sequence, m answer tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, Batch, collate
from vlmpeft.decode import Asked, Request, adapters_of, answer_ids, batches, exchange_of
from vlmpeft.errors import ModelError
from vlmpeft.images import ImageReader, ImageTransform
from vlmpeft.language import hidden_states, logits_of
from vlmpeft.prefix import can_share, piece_of, read_prefixes
from vlmpeft.routed import routed
from vlmpeft.routing import chosen_rows, position_ids, routing_of
from vlmpeft.template import Encoding, TurnEncoder
from vlmpeft.vlm import VLM


@dataclass(frozen=True)
class Likelihood:
    """log_probability: of all the answer, in nats. tokens: of it. greedy: whether each is the model's first choice."""

    log_probability: float
    tokens: int
    greedy: bool


def likelihoods(
    model: VLM,
    encoder: TurnEncoder,
    transform: ImageTransform,
    pairs: Sequence[tuple[Request, str]],
    *,
    batch_size: int = 8,
) -> list[Likelihood]:
    """How likely a model is to answer each request with the text beside it; what ends an answer does not count.

    Returns: in the order of `pairs`; the same as one by one.
    Raises: ModelError M518 for an answer without a token.
    """
    read = ImageReader(transform)
    asked = [
        Asked(r, _encoding(encoder, r, text, [read.num_views(i) for i in r.images]), adapter)
        for (r, text), adapter in zip(pairs, adapters_of(len(pairs)), strict=True)
    ]
    found: dict[int, Likelihood] = {}
    model.eval()
    for chosen in batches(asked, batch_size):
        with chosen_rows(chosen):
            scored = _score(model, read, [asked[i] for i in chosen])
        found |= dict(zip(chosen, scored, strict=True))
    return [found[i] for i in range(len(pairs))]


def _encoding(encoder: TurnEncoder, request: Request, text: str, views: Sequence[int]) -> Encoding:
    """The request with `text` for an answer; only that carries labels."""
    ids = answer_ids(encoder, text)
    if not ids:
        raise ModelError("M518", f"the tokenizer has no token for the answer {text!r:.80}.")
    encoding = encoder.encode([exchange_of(request)], views=views)
    encoding.add(ids, supervised=True, turn=0)
    return encoding


@torch.no_grad()
def _score(model: VLM, read: ImageReader, rows: Sequence[Asked]) -> list[Likelihood]:
    device = model.language.get_input_embeddings().weight.device
    keys, first_of = [row.key for row in rows], {row.key: row.request for row in reversed(rows)}
    views_of = {key: [v for image in request.images for v in read(image)] for key, request in first_of.items()}
    begun = all(row.shared and row.encoding.labels[row.shared] == IGNORE for row in rows)
    if begun and len(first_of) < len(rows) and can_share(model.language, max(row.length for row in rows)):
        views = [view for key in dict.fromkeys(keys) for view in views_of[key]]
        cache, mask = read_prefixes(model, [row.encoding for row in rows], keys, views)
        rest = collate([piece_of(r.encoding, r.shared, None) for r in rows], side="left").to(device)
        logits = _continued(model, rest, cache, mask)
    else:
        rest = collate([r.encoding for r in rows], [v for key in keys for v in views_of[key]]).to(device)
        logits = model(**rest.tensors()).logits
    return _likelihoods(logits.float(), rest)


def _continued(model: VLM, rest: Batch, cache: object, mask: Tensor) -> Tensor:
    """Logits (m, v) before every answer token, of rows whose beginnings are in the cache."""
    language = model.language
    mask = torch.cat([mask, rest.attention_mask], 1)
    positions = position_ids(mask, None)[:, -rest.input_ids.shape[1] :]
    with routed(routing_of(rest.input_ids, rest.attention_mask, rest.labels, IMAGE_TOKEN_ID, (0, 1))):
        embeddings = language.get_input_embeddings()(rest.input_ids)
        hidden = hidden_states(language, embeddings, mask, positions, cache)
    return logits_of(language, hidden.flatten(0, 1)[rest.supervised])


def _likelihoods(logits: Tensor, batch: Batch) -> list[Likelihood]:
    """Args: logits (m, v) at `batch.supervised`. Returns: one a row."""
    counts = (batch.labels != IGNORE).sum(1).tolist()
    targets = batch.labels[batch.labels != IGNORE]  # (m,), row by row as the logits
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    first = logits.argmax(-1) == targets
    sums = torch.stack([row.sum() for row in chosen.split(counts)]).tolist()
    greedy = torch.stack([row.all() for row in first.split(counts)]).tolist()
    return [Likelihood(*row) for row in zip(sums, counts, greedy, strict=True)]
