"""Attention whose virtual tokens count for each query as much as a gate says.

Letters: b batch, s queries, t keys, n virtual tokens in front of them, h heads, e head width.

A gate g scales the virtual keys and values that a query meets: scores q (g k) and values g v. As g differs from query
to query, no scaled keys can be put into a cache. Instead every head becomes twice as wide: the query is (q, g q), a key
of the sequence (k, 0) and a virtual one (0, k), and likewise the values. So any implementation of attention serves.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "vlmpeft_gated"  # under which transformers' attention modules find it
GATE = "prefix_gate"  # what an attention module hands on to it: n and the gates


def gated_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """As transformers' attention functions: query (b, h, s, e), key and value (b, h, t, e) -> (b, s, h, e), weights."""
    given: tuple[int, Tensor] | None = kwargs.pop(GATE, None)
    inner = _inner(module)
    if given is None:
        return inner(module, query, key, value, attention_mask, **kwargs)
    count, gate = given[0], given[1].to(query.dtype)  # (b, s, 1)
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    wide = torch.cat([query, query * gate[:, None]], -1)
    out, weights = inner(module, wide, _apart(key, count), _apart(value, count), attention_mask, **kwargs)
    own, virtual = out.chunk(2, -1)
    return own + virtual * gate[:, :, None], weights


def _apart(states: Tensor, count: int) -> Tensor:
    """(b, h, t, e) -> (b, h, t, 2 e): the first `count` in the second half, the others in the first."""
    width = states.shape[-1]
    return torch.cat([F.pad(states[:, :, :count], (width, 0)), F.pad(states[:, :, count:], (0, width))], 2)


def _inner(module: Any) -> Any:
    """The attention function of a module as its model is set now."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config.gated_from._attn_implementation
    if name == "eager":  # each model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def can_gate(attention: nn.Module) -> bool:
    """Whether a self-attention asks transformers for its function, and hands on what it is given besides."""
    return hasattr(getattr(attention, "config", None), "_attn_implementation") and hasattr(
        sys.modules[type(attention).__module__], "eager_attention_forward"
    )


def put_gate(attention: Any) -> None:
    """Let a self-attention compute by `gated_attention`; the model's own config stays as it is."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, gated_attention)
    own = copy.copy(attention.config)
    own.gated_from = attention.config
    own._attn_implementation_internal = NAME
    attention.config = own


def take_gate(attention: Any) -> None:
    """Undo `put_gate`."""
    attention.config = attention.config.gated_from
