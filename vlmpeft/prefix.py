"""Questions about the same images share their beginning: its keys and values are computed once, then copied a row each.

Letters: b rows, u different beginnings, s sequence, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmpeft.batch import IMAGE_TOKEN_ID, collate
from vlmpeft.language import hidden_states, logits_of, takes_positions
from vlmpeft.routed import routed
from vlmpeft.routing import chosen_rows, position_ids, text_routing
from vlmpeft.template import Encoding
from vlmpeft.vlm import VLM

PLAIN_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def shared_length(encoding: Encoding) -> int:
    """Tokens up to the end of the last image: what questions about the same images have in common."""
    ids = encoding.input_ids
    return len(ids) - ids[::-1].index(IMAGE_TOKEN_ID) if IMAGE_TOKEN_ID in ids else 0


def can_share(language: Any, length: int) -> bool:
    """Whether padding between a beginning and its continuation changes nothing for this model.

    Args: length: tokens of the longest row with its answer; a sliding window counts padding, so it must hold them all.
    """
    config = language.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    plain = (
        not getattr(language, "_is_stateful", False)
        and set(getattr(config, "layer_types", None) or ()) <= PLAIN_ATTENTION
    )
    return plain and takes_positions(language) and all(window is None or length <= window for window in windows)


@torch.no_grad()
def generate_shared(
    model: VLM,
    encodings: Sequence[Encoding],
    keys: Sequence[Hashable],
    views: Sequence[Tensor],
    max_new_tokens: int,
    stops: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Continue rows greedily.

    Args:
        keys: equal where rows begin with the same images and ids.
        views: of the images of the different keys in the order they first appear, one tensor a view.

    Returns: new tokens (b, new), the logits (b, v) of the first of them.
    """
    language = model.language
    table = language.get_input_embeddings()
    cache, mask = read_prefixes(model, encodings, keys, views)
    rest = collate([part(e, shared_length(e), None) for e in encodings], side="left").to(table.weight.device)
    mask = torch.cat([mask, rest.attention_mask], 1)
    positions = position_ids(mask, None)[:, -rest.input_ids.shape[1] :]
    with routed(text_routing(rest.attention_mask, answer=False)):
        hidden = hidden_states(language, table(rest.input_ids), mask, positions, cache)
    first = logits = logits_of(language, hidden[:, -1])
    ends = torch.tensor(stops, device=mask.device)
    tokens: list[Tensor] = []
    done = torch.zeros(len(encodings), dtype=torch.bool, device=mask.device)
    while True:
        tokens.append(logits.argmax(-1))
        done |= torch.isin(tokens[-1], ends)
        if len(tokens) == max_new_tokens or done.all():
            return torch.stack(tokens, 1), first
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        with routed(text_routing(mask[:, -1:], answer=True)):
            hidden = hidden_states(language, table(tokens[-1][:, None]), mask, position_ids(mask, None)[:, -1:], cache)
        logits = logits_of(language, hidden[:, -1])


def read_prefixes(
    model: VLM, encodings: Sequence[Encoding], keys: Sequence[Hashable], views: Sequence[Tensor]
) -> tuple[Any, Tensor]:
    """Keys and values of every different beginning. Args: as `generate_shared`.

    Returns: cache and mask (b, s), a row each of `encodings`.
    """
    from transformers import DynamicCache

    different = dict(zip(keys, encodings, strict=True))
    order = list(dict.fromkeys(keys))
    prefixes = [part(different[key], 0, shared_length(different[key])) for key in order]
    batch = collate(prefixes, views, side="left").to(model.language.get_input_embeddings().weight.device)
    cache = DynamicCache(config=model.language.config)
    positions = position_ids(batch.attention_mask, None)
    with chosen_rows([keys.index(key) for key in order]):
        routing, embeddings = model.embed_batch(batch)
    with routed(routing):
        hidden_states(model.language, embeddings, batch.attention_mask, positions, cache)
    index = torch.tensor([order.index(key) for key in keys], device=batch.input_ids.device)
    cache.batch_select_indices(index)
    return cache, batch.attention_mask[index]


def part(encoding: Encoding, start: int, stop: int | None) -> Encoding:
    """The tokens from `start`, which is 0 or behind the images, to before `stop`, which is behind them."""
    rows = encoding.input_ids[start:stop], encoding.labels[start:stop], encoding.turns[start:stop]
    return Encoding(*rows, tilings=[] if start else encoding.tilings)
