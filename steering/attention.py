"""Attention read as it happens: which rows are asked, what falls on the image and on the text, nothing of size s x s.

Letters: b batch, t queries, s keys, q asked queries of a sample (padded to the most of the batch), h heads, g query
heads a key head, d head width.

Nothing of a model is replaced. Queries and keys are read where the model hands them to scaled_dot_product_attention,
and the asked rows alone are computed a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.routed import RoutedModel, current_routing, route
from vlmpeft.routing import Routing

TextScope = Literal["instruction", "prompt", "all"]
Queries = Literal["output", "all_text"]
CHUNK = 64  # queries computed at once: h x CHUNK x s floats are held


@dataclass(frozen=True)
class Call:
    """The arguments of one attention: query (b, h, t, d), key (b, h / g, s, d), mask broadcastable to (b, h, t, s).

    Args: mask: True where attention is allowed, or added to the logits. causal, scale: as the kernel has them.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The queries at `rows` (b, q). Returns: weights (b, h, q, s) in fp32; who sees whom, (b, h or 1, q, s) bool.

        The weights of a row that sees nothing, as one of padding, are NaN.
        """
        (b, heads, size, width), keys = self.query.shape, self.key.shape[2]
        groups = heads // self.key.shape[1]
        picked = _rows(self.query, rows).float() * (width**-0.5 if self.scale is None else self.scale)
        grouped = rearrange(picked, "b (k g) q d -> b k (g q) d", g=groups)
        logits = rearrange(grouped @ self.key.float().mT, "b k (g q) s -> b (k g) q s", g=groups)
        visible = torch.ones(1, dtype=torch.bool, device=rows.device).expand(b, 1, rows.shape[1], keys)
        if self.mask is not None:
            mask = _rows(self.mask.expand(b, -1, size, keys), rows)
            if mask.dtype == torch.bool:
                visible = mask
            else:
                visible = mask > torch.finfo(mask.dtype).min / 2
                logits = logits.add_(mask)
        if self.causal:  # the kernel aligns both at their beginning
            visible = visible & (torch.arange(keys, device=rows.device) <= rows[:, None, :, None])
        unseen = torch.zeros(visible.shape, device=rows.device).masked_fill_(~visible, -torch.inf)
        return logits.add_(unseen).softmax(-1), visible  # a sum is faster than a fill of every head


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (b, q) of dimension 2: (b, h, t, e) -> (b, h, q, e)."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


@dataclass(frozen=True)
class Asked:
    """Whose attention on what is read in one forward.

    rows: (b, q) positions of the queries; any position where `real` (b, q) is False. image, text: (b, s) bool keys.
    """

    rows: Tensor
    real: Tensor
    image: Tensor
    text: Tensor


def asked_of(routing: Routing, scope: TextScope, queries: Queries, drop_sink: int) -> Asked:
    """Queries and keys of a forward, from its routing. On an accelerator this waits for the device once."""
    count = (routing.visual | routing.text).long().cumsum(1)  # of real tokens, each included
    if queries == "all_text":
        wanted = routing.text
    elif routing.predict is not None:
        wanted = routing.predict
    else:  # the last token of the prompt, from which the answer starts
        wanted = (routing.visual | routing.text) & (count == count[:, -1:])
    text = routing.text
    if scope != "all" and routing.answer is not None:
        text = text & ~routing.answer
    if scope == "instruction" and routing.instruction is not None:
        text = text & routing.instruction
    text = text & (count > drop_sink)
    order = wanted.long().argsort(dim=1, descending=True, stable=True)[:, : int(wanted.sum(1).max())]
    return Asked(order, wanted.gather(1, order), keys_of(routing.visual, routing), keys_of(text, routing))


def keys_of(mask: Tensor, routing: Routing) -> Tensor:
    """A mask of tokens (b, t) as one of keys (b, s): those of a trained prefix, in front, are False."""
    return F.pad(mask, (routing.prefix, 0), value=False)


@dataclass(frozen=True)
class Attended:
    """Means over the queries of each sample, (b, h).

    image, text: attention a token of those that the query sees, over the queries that see both; NaN where none does.
    mass: the share of all attention that falls on the image, over all queries.
    """

    image: Tensor
    text: Tensor
    mass: Tensor


def attended(call: Call, asked: Asked, chunk: int = CHUNK) -> Attended:
    """What the asked queries attend to. Args: chunk: queries computed at once."""
    b, heads = call.query.shape[:2]
    call = replace(call, key=call.key.float())  # once for all chunks
    marks = torch.stack([asked.image, asked.text], -1).float()[:, None]  # (b, 1, s, 2)
    per_token = torch.zeros(b, heads, 2, device=marks.device)
    counted, on_image = per_token[..., 0].clone(), per_token[..., 0].clone()
    for start in range(0, asked.rows.shape[1], chunk):
        weights, visible = call.at(asked.rows[:, start : start + chunk])
        real = asked.real[:, None, start : start + chunk]  # (b, 1, q)
        mass = weights @ marks  # (b, h, q, 2)
        tokens = visible.float() @ marks
        both = real & (tokens > 0).all(-1)
        per_token += (mass / tokens).where(both[..., None], 0.0).sum(2)
        counted += both.sum(2)
        on_image += mass[..., 0].where(real, 0.0).sum(2)
    image, text = (per_token / counted[..., None]).unbind(-1)
    return Attended(image, text, on_image / asked.real.sum(1, keepdim=True))


See = Callable[[int, Routing, Call], None]


class Reader:
    """Shows every attention of the decoder blocks to `see`, with block and routing, inside its `with` block.

    A call that is made again in backward, where activations are checkpointed, is not shown.
    """

    def __init__(self, model: nn.Module, parts: Parts, see: See) -> None:
        self.model, self.parts, self.see = model, parts, see
        self._routed: RoutedModel | None = None
        self._hooks: list[Any] = []
        self._inside: list[_Intercept] = []

    def __enter__(self) -> Reader:
        self._routed = route(self.model, self.parts)
        for number, block in enumerate(self.parts.blocks):
            self._hooks.append(block.register_forward_pre_hook(self._opener(number)))
            self._hooks.append(block.register_forward_hook(self._close, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._routed is not None:
            self._routed.release()
            self._routed = None

    def _opener(self, number: int) -> Callable[..., None]:
        """A hook that intercepts from here to the block's end: what is outside blocks takes its own ways undisturbed,
        as nn.MultiheadAttention of an encoder does, which computes otherwise where a mode is on."""

        def enter(*_: Any) -> None:
            mode = _Intercept(lambda call: self._show(number, call))
            mode.__enter__()
            self._inside.append(mode)

        return enter

    def _close(self, *_: Any) -> None:
        if self._inside:
            self._inside.pop().__exit__(None, None, None)

    @torch.no_grad()
    def _show(self, number: int, call: Call) -> None:
        routing = current_routing()
        keys, tokens = call.key.shape[2], routing.visual.shape[1] + routing.prefix
        if keys != tokens:
            message = f"block {number} attends to {keys} keys in a forward that has {tokens}: they are in a cache."
            raise ModelError("M564", message, "generate first, then run the model once on prompt and answer.")
        with torch.autocast(call.query.device.type, enabled=False):
            self.see(number, routing, call)


class _Intercept(TorchFunctionMode):
    """Hands the arguments of every scaled_dot_product_attention to `see`, and changes nothing."""

    def __init__(self, see: Callable[[Call], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.see(_call(*args, **(kwargs or {})))
        return out


def _call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Call:  # fmt: skip
    """A call as scaled_dot_product_attention takes it."""
    return Call(query, key, attn_mask, is_causal, scale)
