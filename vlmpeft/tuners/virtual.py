"""Virtual tokens in front of a sequence: what a decoder must know of them, whoever brings them.

Letters: b batch, s tokens of the call, t past and present tokens, n virtual tokens that are keys and values only (a
deep prefix), m virtual tokens at the input (prompts), d width.

The positions are those of `peft`: the deep prefix first, the prompts behind it at n ... n + m - 1, then the sequence,
whose first real token is at n + m. What calls the decoder sees nothing of that: embeddings, masks, positions and hidden
states go in and come out without virtual tokens. Only a KV cache holds the prompts, at its beginning.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, path_of
from vlmpeft.routed import cache_of, find_routing, routed
from vlmpeft.routing import Routing
from vlmpeft.tuners.attachment import Attachment


class VirtualTokens(Attachment):
    """Virtual tokens of a model. Args: decoder: the module that holds the blocks; `decoder_with` finds it."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.front = front_of(decoder)
        self.front.users.append(self)

    @property
    def deep(self) -> int:
        """n."""
        return 0

    def prompts(self) -> Tensor | None:
        """(m, d), or None for none."""
        return None

    @property
    def unmergeable(self) -> str:
        """See `Attachment.unmergeable`."""
        return "its tokens stand before the sequence, not in a weight"

    def put_into(self, model: nn.Module, parts: Parts, name: str) -> dict[str, nn.Parameter]:
        """Make it a part of the language model, in fp32 on its device. Returns: its parameters by name in `model`."""
        self.to(next(parts.blocks[0].parameters()).device).train(parts.language.training)
        parts.language.add_module(name, self)
        prefix = ".".join(p for p in (path_of(model, parts.language), name) if p)
        return {f"{prefix}.{key}": p for key, p in self.named_parameters()}

    def take_out(self, model: nn.Module, path: str) -> None:
        """See `Attachment.take_out`."""
        self.front.leave(self)
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)


class DecoderFront:
    """Stands before a decoder's forward, for all virtual tokens of a model together."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder, self.original = decoder, decoder.forward
        self.__signature__ = inspect.signature(decoder.forward)  # what `inspect` tells of the wrapper
        self.users: list[VirtualTokens] = []

    def leave(self, user: VirtualTokens) -> None:
        """One user less; with the last one the decoder has its own forward back."""
        self.users = [u for u in self.users if u is not user]
        if not self.users:
            del self.decoder.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward with the virtual tokens of all that are enabled."""
        active = [user for user in self.users if user.enabled]
        if not active:
            return self.original(*args, **kwargs)
        given = self._by_name(args, kwargs)
        found = [p for user in active if (p := user.prompts()) is not None]
        prompts = torch.cat(found) if found else None
        return self._run(given, sum(user.deep for user in active), prompts)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self.__signature__.bind_partial(*args, **kwargs).arguments
        extra = {k for k, p in self.__signature__.parameters.items() if p.kind is p.VAR_KEYWORD}
        return {k: v for k, v in bound.items() if k not in extra} | kwargs

    def _run(self, given: dict[str, Any], deep: int, prompts: Tensor | None) -> Any:
        """The call with positions behind the virtual tokens. Args: deep: n; prompts: (m, d)."""
        count = 0 if prompts is None else len(prompts)
        cache, mask = cache_of(given), given.get("attention_mask")
        past = 0 if cache is None else int(cache.get_seq_length())
        embeddings = given.get("inputs_embeds")
        tokens = given["input_ids"] if embeddings is None else embeddings
        positions = given.get("position_ids")
        if positions is None:
            positions = _positions(mask, tokens, max(0, past - count))
        if prompts is None:
            with routed(_routing(0, deep)):
                return self.original(**given | {"position_ids": positions + deep})
        given = given | {"position_ids": positions + deep + count, "attention_mask": wider(mask, count)}
        if past:  # they are in the cache
            with routed(_routing(0, deep)):
                return self.original(**given)
        if getattr(cache, "is_compileable", False):
            message = "a KV cache of fixed size has no room for virtual tokens at the input."
            raise ModelError("M567", message, "generate with the cache that grows, or use prefix_tuning.")
        if embeddings is None:
            embeddings = self.decoder.get_input_embeddings()(tokens)  # type: ignore[operator]
        before = torch.arange(deep, deep + count, device=positions.device).expand(*positions.shape[:-1], count)
        given |= {
            "input_ids": None,
            "inputs_embeds": torch.cat([prompts.to(embeddings.dtype).expand(len(embeddings), -1, -1), embeddings], 1),
            "attention_mask": with_rows(given["attention_mask"], count),
            "position_ids": torch.cat([before, given["position_ids"]], -1),
        }
        with routed(_routing(count, deep)):
            return without_first(self.original(**given), count)


def front_of(decoder: nn.Module) -> DecoderFront:
    """What stands before a decoder; made if nothing does.

    Raises: ModelError M567 for a decoder that takes no positions: it would count the virtual tokens wrongly.
    """
    front = vars(decoder).get("forward")
    if isinstance(front, DecoderFront):
        return front
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        message = f"{type(decoder).__name__} computes positions itself, so no virtual tokens can stand before it."
        raise ModelError("M567", message, "use an adapter on its layers, such as lora.")
    front = DecoderFront(decoder)
    decoder.forward = front
    return front


def decoder_with(parts: Parts) -> nn.Module:
    """The module that holds the decoder blocks: embeddings in, hidden states out."""
    for module in parts.language.modules():
        lists = [c for c in module.children() if isinstance(c, nn.ModuleList)]
        if any(block is parts.blocks[0] for blocks in lists for block in blocks):
            return module
    message = f"{type(parts.language).__name__} keeps its blocks in no list, so nothing can stand before them."
    raise ModelError("M567", message, "use an adapter on its layers, such as lora.")


def _positions(mask: Any, tokens: Tensor, past: int) -> Tensor:
    """(b or 1, s): a token's number among the real ones of its row, where the mask says which are."""
    size = tokens.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -size:]
    return torch.arange(past, past + size, device=tokens.device)[None]


def wider(mask: Any, count: int) -> Any:
    """A mask with `count` columns in front that everything sees.

    Args: mask: None, (b, t) of real tokens, (b, 1, s, t) bool or added to the scores, or several by kind of layer.
    Raises: ModelError M567 for one of another kind.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        return {kind: wider(one, count) for kind, one in mask.items()}
    if not isinstance(mask, Tensor):
        message = f"virtual tokens cannot stand before a mask of kind {type(mask).__name__}."
        raise ModelError("M567", message, "load the language model with attention=sdpa.")
    return F.pad(mask, (count, 0), value=True if mask.ndim == 2 or mask.dtype == torch.bool else 0.0)


def with_rows(mask: Any, count: int) -> Any:
    """A mask (b, 1, s, count + t) with rows on top for the first `count` tokens, which see what is before them.

    Those of real tokens (b, t) need none.
    """
    if isinstance(mask, Mapping):
        return {kind: with_rows(one, count) for kind, one in mask.items()}
    if mask is None or mask.ndim == 2:
        return mask
    size = mask.shape[-1]
    allowed = torch.ones(count, size, dtype=torch.bool, device=mask.device).tril().expand(*mask.shape[:2], -1, -1)
    if mask.dtype != torch.bool:
        allowed = torch.zeros_like(allowed, dtype=mask.dtype).masked_fill(~allowed, torch.finfo(mask.dtype).min)
    return torch.cat([allowed, mask], 2)


def _routing(count: int, deep: int) -> Routing | None:
    """The routing of the forward, with `count` tokens in front that are neither image nor text and `deep` keys more."""
    now = find_routing()
    if now is None or not (count or deep):
        return now
    if not count:  # the tokens are the same, and so is what was computed of them
        return dataclasses.replace(now, prefix=deep)
    masks = {name: mask for name in MASKS if (mask := getattr(now, name)) is not None}
    wide: dict[str, Any] = {name: F.pad(mask, (count, 0), value=False) for name, mask in masks.items()}
    return dataclasses.replace(now, memo={}, prompts=count, prefix=deep, **wide)


MASKS = ("visual", "text", "answer", "predict", "instruction")  # of a Routing


def without_first(out: Any, count: int) -> Any:
    """What a decoder gives, without its first `count` tokens."""
    if isinstance(out, tuple):
        return (out[0][:, count:], *out[1:])
    out.last_hidden_state = out.last_hidden_state[:, count:]
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(hidden[:, count:] for hidden in out.hidden_states)
    return out


def token_table(parts: Parts) -> Any:
    """The token embedding of the language model: a module with a weight."""
    decoder: Any = decoder_with(parts)
    return decoder.get_input_embeddings()


@torch.no_grad()
def embedding_like(parts: Parts, count: int) -> Tensor:
    """(count, d) fp32 drawn with the mean and spread of the token embeddings: peft's N(0, 1) lies far off theirs."""
    weight = token_table(parts).weight.float()
    return weight.mean(0) + weight.std(0) * torch.randn(count, weight.shape[1], device=weight.device)
