"""LMAR, the layer-wise modality attention ratio (arXiv:2412.12359 eq. 2), read from attention as it happens.

Letters: b batch, s keys, q queries of a sample (padded to the most of the batch), h heads, g query heads a key head,
d head width, l layers, n samples.

For a query, alpha_X is the attention that falls on the visible tokens of X, per token of X; averaged over the heads and
the queries of a sample, the ratio alpha_image / alpha_text is the sample's, and LMAR the mean of it over samples.
Uniform attention gives exactly 1. Nothing of size s x s is made and no layer's attention is changed: queries and keys
are read where the model hands them to scaled_dot_product_attention, and only the asked rows are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, parts_of
from vlmpeft.routed import RoutedModel, current_routing, route
from vlmpeft.routing import Routing

TextScope = Literal["instruction", "prompt", "all"]
Queries = Literal["output", "all_text"]
CHUNK = 64  # queries computed at once: h x CHUNK x s floats are held


@dataclass(frozen=True)
class Asked:
    """Whose attention on what is read in one forward.

    rows: (b, q) positions of the queries, 0 where `real` (b, q) is False. image, text: (b, s) bool keys.
    """

    rows: Tensor
    real: Tensor
    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class Attended:
    """Means over the queries of each sample, per head. image, text: attention a token. mass: share on the image."""

    image: Tensor  # (b, h)
    text: Tensor  # (b, h)
    mass: Tensor  # (b, h)


def asked_of(routing: Routing, scope: TextScope, queries: Queries, drop_sink: int) -> Asked:
    """Queries and keys of a forward, from its routing."""
    real = routing.visual | routing.text
    if queries == "all_text":
        wanted = routing.text
    elif routing.predict is not None:
        wanted = routing.predict
    else:  # the last token of the prompt, from which the answer starts
        count = real.long().cumsum(1)
        wanted = real & (count == count[:, -1:])
    text = routing.text
    if scope != "all" and routing.answer is not None:
        text = text & ~routing.answer
    if scope == "instruction" and routing.instruction is not None:
        text = routing.instruction
    text = text & (real.long().cumsum(1) > drop_sink)
    order = wanted.long().argsort(dim=1, descending=True, stable=True)[:, : int(wanted.sum(1).max())]
    return Asked(order, wanted.gather(1, order), routing.visual, text)


def attended(
    query: Tensor, key: Tensor, asked: Asked, mask: Tensor | None = None, causal: bool = False,
    scale: float | None = None,
) -> Attended:  # fmt: skip
    """What the asked queries attend to. Args: as scaled_dot_product_attention: (b, h, t, d), (b, h / g, s, d)."""
    sums = [torch.zeros(query.shape[:2], device=query.device) for _ in range(3)]
    for start in range(0, asked.rows.shape[1], CHUNK):
        rows, real = asked.rows[:, start : start + CHUNK], asked.real[:, start : start + CHUNK]
        weights = _weights(query, key, rows, mask, causal, scale)  # (b, h, q, s)
        visible = _visible(rows, query.shape[2], key.shape[2])  # (b, q, s)
        on_image, on_text = (torch.einsum("bhqs,bs->bhq", weights, x.float()) for x in (asked.image, asked.text))
        images, texts = ((visible & x[:, None]).sum(-1).clamp_min(1)[:, None] for x in (asked.image, asked.text))
        for total, part in zip(sums, (on_image / images, on_text / texts, on_image), strict=True):
            total += (part * real[:, None]).sum(-1)
    count = asked.real.sum(1, keepdim=True).clamp_min(1)
    return Attended(*(total / count for total in sums))


def _visible(rows: Tensor, queries: int, keys: int) -> Tensor:
    """(b, q, s): keys not after a query."""
    return torch.arange(keys, device=rows.device) <= rows[..., None] + (keys - queries)


def _weights(
    query: Tensor, key: Tensor, rows: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Softmax weights (b, h, q, s) in fp32 of the queries at `rows` (b, q), grouped query heads spelled out."""
    groups = query.shape[1] // key.shape[1]
    width = query.shape[-1]
    picked = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, width)).float()
    grouped = rearrange(picked, "b (k g) q d -> b k (g q) d", g=groups)
    logits = rearrange(grouped @ key.float().mT, "b k (g q) s -> b (k g) q s", g=groups)
    logits = logits * (width**-0.5 if scale is None else scale)
    if mask is not None:
        wide = mask.expand(query.shape[0], -1, query.shape[2], -1)
        at_rows = wide.gather(2, rows[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[3]))
        logits = logits.masked_fill(~at_rows, -torch.inf) if mask.dtype == torch.bool else logits + at_rows.float()
    if causal:
        logits = logits.masked_fill(~_visible(rows, query.shape[2], key.shape[2])[:, None], -torch.inf)
    return logits.softmax(-1)


class _Intercept(TorchFunctionMode):
    """Hands the arguments of every scaled_dot_product_attention to `see`, and changes nothing."""

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.see(*args, **(kwargs or {}))
        return out


class LMARProbe:
    """Reads LMAR in every forward inside its `with` block; see `lmar`."""

    def __init__(self, model: nn.Module, parts: Parts, text_scope: TextScope, queries: Queries, drop_sink: int) -> None:
        self.model, self.parts = model, parts
        self.options: tuple[TextScope, Queries, int] = (text_scope, queries, drop_sink)
        self.skipped = 0  # samples without an image or without text
        self._seen: list[dict[int, Attended]] = []  # per forward, by layer
        self._kept: list[Tensor] = []  # per forward, (b,) bool
        self._layer: int | None = None
        self._routed: RoutedModel | None = None
        self._hooks: list[Any] = []
        self._mode = _Intercept(self._see)

    def __enter__(self) -> LMARProbe:
        self._routed = route(self.model, self.parts)
        for number, block in enumerate(self.parts.blocks):
            self._hooks.append(block.register_forward_pre_hook(lambda *_, number=number: self._at(number)))
            self._hooks.append(block.register_forward_hook(lambda *_: self._at(None), always_call=True))
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._routed is not None:
            self._routed.release()
            self._routed = None

    def _at(self, layer: int | None) -> None:
        self._layer = layer

    @torch.no_grad()
    def _see(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        if self._layer is None:  # the vision tower's
            return
        routing = current_routing()
        if self not in routing.memo:
            asked = asked_of(routing, *self.options)
            kept = asked.image.any(1) & asked.text.any(1) & asked.real.any(1)
            self.skipped += int((~kept).sum())
            self._seen.append({})
            self._kept.append(kept)
            routing.memo[self] = asked
        self._seen[-1][self._layer] = attended(query, key, routing.memo[self], attn_mask, is_causal, scale)

    def _stacked(self, pick: Callable[[Attended], Tensor]) -> Tensor:
        """(n, l, h) over all samples with an image and text. Raises: ModelError M561 if a block was not read."""
        layers = len(self.parts.blocks)
        if not self._seen or any(len(seen) != layers for seen in self._seen):
            read = len(self._seen[0]) if self._seen else 0
            message = f"attention of {read} of {layers} blocks was read."
            raise ModelError("M561", message, "run the model inside the `with` block, with attention=sdpa.")
        forwards = [torch.stack([pick(seen[number]) for number in range(layers)], 1) for seen in self._seen]
        return torch.cat([x[kept].float().cpu() for x, kept in zip(forwards, self._kept, strict=True)])

    def per_sample(self) -> Tensor:
        """(n, l) ratio of every sample: heads and queries averaged before the ratio."""
        image, text = (reduce(self._stacked(pick), "n l h -> n l", "mean") for pick in (_image, _text))
        return image / text

    def per_head(self) -> Tensor:
        """(n, l, h) the same for every head by itself."""
        return self._stacked(_image) / self._stacked(_text)

    def ratio(self) -> Tensor:
        """(l,) LMAR: the mean over samples of their ratios."""
        return self.per_sample().mean(0)

    def mass(self) -> Tensor:
        """(l,) share of the attention that falls on the image."""
        return reduce(self._stacked(lambda a: a.mass), "n l h -> l", "mean")


def _image(a: Attended) -> Tensor:
    return a.image


def _text(a: Attended) -> Tensor:
    return a.text


def lmar(
    model: nn.Module, parts: Parts | None = None, *, text_scope: TextScope = "instruction",
    queries: Queries = "output", drop_sink: int = 0,
) -> LMARProbe:  # fmt: skip
    """`with lmar(model, parts) as probe: model(...)`, then `probe.ratio()`.

    Args:
        text_scope: the text compared with the image: "instruction" (what the user says, where the forward knows turns,
            else as "prompt"), "prompt" (all of the prompt but the image), "all" (also earlier answer tokens).
        queries: "output", the positions that predict answer tokens (without labels the last one), or "all_text".
        drop_sink: leaves the first tokens of the sequence out of the text, where attention sinks.
    """
    return LMARProbe(model, parts or parts_of(model), text_scope, queries, drop_sink)
