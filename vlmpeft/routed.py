"""The routing of a forward, made known to what acts inside the blocks, recomputed ones included.

A block is recomputed in backward when activations are checkpointed, long after the forward it belongs to. What the
block needs then must travel with it: `RoutedBlock` hands the routing to the checkpointed function as an argument.
State kept in modules or in transient hooks would be another forward's by then, or gone (see docs/development.md).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import HasParts, Parts
from vlmpeft.routing import Routing, routing_of

Change = Callable[[Tensor, Routing], Tensor]  # hidden states (b, s, d) -> the same shape

_CURRENT: ContextVar[Routing | None] = ContextVar("routing", default=None)
_PROMPT: ContextVar[int | None] = ContextVar("prompt", default=None)  # tokens of a prompt that `generate` got
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")  # a KV cache; "cache" since transformers 5.24


def current_routing() -> Routing:
    """The routing of the forward that runs. Raises: ModelError M560 outside a routed one."""
    routing = _CURRENT.get()
    if routing is None:
        message = "an adapter that depends on where the image is ran outside a forward with input_ids."
        fix = "call the tuned model itself with input_ids, and let its blocks do the activation checkpointing."
        raise ModelError("M560", message, fix)
    return routing


def find_routing() -> Routing | None:
    """The routing of the forward that runs, if it has one."""
    return _CURRENT.get()


def cache_name(forward: Callable[..., Any]) -> str | None:
    """What a forward calls the KV cache it takes."""
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHES if name in taken), None)


def cache_of(given: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a call, if there is one."""
    return next((given[name] for name in CACHES if given.get(name) is not None), None)


@contextlib.contextmanager
def routed(routing: Routing | None) -> Iterator[None]:
    """Make `routing` the current one inside a `with` block."""
    token = _CURRENT.set(routing)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def generating(language: nn.Module, prompt: Routing) -> Iterator[None]:
    """Every call of `language` inside sees the routing of the tokens it gets: the prompt, whole or in parts, then more.

    Args: prompt: routing of the prompts (b, s); what comes after it is the model's own answer.
    """

    signature = inspect.signature(language.forward)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _arguments(signature, args, kwargs)
        tokens = given.get("inputs_embeds")
        length = (given["input_ids"] if tokens is None else tokens).shape[1]
        cache = cache_of(given)
        entered.append(_CURRENT.set(window(prompt, 0 if cache is None else cache.get_seq_length(), length)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        _CURRENT.reset(entered.pop())

    entered: list[Token[Routing | None]] = []
    hooks = [language.register_forward_pre_hook(enter, with_kwargs=True)]
    hooks.append(language.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those that a **kwargs takes included."""
    bound = signature.bind_partial(*args, **kwargs)
    extra = {k for k, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD}
    return {k: v for k, v in bound.arguments.items() if k not in extra} | kwargs


def window(prompt: Routing, start: int, length: int) -> Routing:
    """The routing of tokens `start` to `start + length` of a generation; those after the prompt are answer tokens."""
    size = prompt.visual.shape[1]
    if start == 0 and length == size:
        return prompt
    new = max(0, start + length - size)

    def cut(mask: Tensor, filler: bool) -> Tensor:
        return F.pad(mask, (0, new), value=filler)[:, start : start + length]

    answer = torch.zeros_like(prompt.visual) if prompt.answer is None else prompt.answer
    images = () if start >= size else None
    return Routing(cut(prompt.visual, False), cut(prompt.text, True), cut(answer, True), images=images)


class RoutedBlock:
    """Stands before a block's forward: keeps the routing for recomputation, and changes what goes in or comes out.

    Args:
        block: a decoder block whose first argument and (first) output are hidden states (b, s, d).
        owner: the model it was wrapped with.
    """

    def __init__(self, block: nn.Module, owner: RoutedModel) -> None:
        self.block, self.original, self.owner = block, block.forward, owner
        self.before: list[Change] = []
        self.after: list[Change] = []
        block.forward = self.forward  # on the instance alone; `remove` takes it away

    def remove(self) -> None:
        """Give the block its own forward back."""
        del self.block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward; the changes act outside of what is recomputed."""
        routing = current_routing()
        if not args:
            args = (kwargs.pop("hidden_states"),)
        hidden = args[0]
        for change in self.before:
            hidden = change(hidden, routing)
        out = self._call(routing, (hidden, *args[1:]), kwargs)
        for change in self.after:
            out = (change(out[0], routing), *out[1:]) if isinstance(out, tuple) else change(out, routing)
        return out

    def _call(self, routing: Routing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block: Any = self.block
        if not (getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled()):
            return self._run(routing, kwargs, *args)
        if not getattr(block, "_can_checkpoint_with_cache", False):  # as transformers' own checkpointing does
            kwargs = kwargs | {name: None for name in CACHES if name in kwargs}
            kwargs = kwargs | ({"use_cache": False} if "use_cache" in kwargs else {})
        return block._gradient_checkpointing_func(partial(self._run, routing, kwargs), *args)

    def _run(self, routing: Routing, kwargs: dict[str, Any], *args: Any) -> Any:
        """The block without its own checkpointing: now, or again in backward."""
        block: Any = self.block
        checkpointing = getattr(block, "gradient_checkpointing", False)
        if checkpointing:
            block.gradient_checkpointing = False
        try:
            with routed(routing):
                return self.original(*args, **kwargs)
        finally:
            if checkpointing:
                block.gradient_checkpointing = True


class RoutedModel:
    """A model whose blocks know where the image is: made by the first that needs it, gone with the last.

    Args:
        model: one of ours, which computes the routing itself, or any other: then its `input_ids`, `attention_mask` and
            `labels` are read as it is called, and in its `generate`, if it has one, what follows the prompt is answer.
    """

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self.parts, self.users = parts, 0
        self.blocks = [RoutedBlock(block, self) for block in parts.blocks]
        self._hooks: list[Any] = []
        self._entered: list[Token[Routing | None]] = []
        self._generating: Any = None
        if not isinstance(model, HasParts):
            if hasattr(model, "generate"):
                self._generating, self._generate = model, model.generate
                self._generating.generate = self.generate  # on the instance alone; `release` takes it away
            self._signature = inspect.signature(model.forward)
            enter = model.register_forward_pre_hook(self._enter, with_kwargs=True)
            self._hooks = [enter, model.register_forward_hook(self._leave, always_call=True)]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _arguments(self._signature, args, kwargs)
        ids = given.get("input_ids")
        self._entered.append(_CURRENT.set(None if ids is None else self._routing(ids, given)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        _CURRENT.reset(self._entered.pop())

    def _routing(self, ids: Tensor, given: dict[str, Any]) -> Routing:
        mask = given.get("attention_mask")
        if mask is None or mask.ndim != 2:
            mask = torch.ones_like(ids)
        behind_cache = mask[:, -ids.shape[1] :]  # of a mask that covers the past as well: the new tokens
        routing = routing_of(ids, behind_cache, given.get("labels"), self.parts.image_token_id)
        prompt = _PROMPT.get()
        if prompt is None or routing.answer is not None:
            return routing
        cache, start = cache_of(given), mask.shape[1] - ids.shape[1]
        if start == 0 and cache is not None:  # of a mask of the new tokens alone
            start = cache.get_seq_length()
        own = torch.arange(start, start + ids.shape[1], device=ids.device) >= prompt
        return replace(routing, answer=own & routing.text)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, with the length of its prompt known to every forward inside."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        token = _PROMPT.set(None if ids is None else ids.shape[1])
        try:
            return self._generate(*args, **kwargs)  # type: ignore[operator]
        finally:
            _PROMPT.reset(token)

    def release(self) -> None:
        """One user less; the last one takes the wrappers off."""
        self.users -= 1
        if self.users == 0:
            if self._generating is not None:
                del self._generating.generate
            for block in self.blocks:
                block.remove()
            for hook in self._hooks:
                hook.remove()


def route(model: nn.Module, parts: Parts) -> RoutedModel:
    """Make the blocks of a model know where the image is; every call needs its `release`."""
    wrappers = (getattr(block.forward, "__self__", None) for block in parts.blocks)
    found = next((w.owner for w in wrappers if isinstance(w, RoutedBlock)), None)
    owner = found or RoutedModel(model, parts)
    owner.users += 1
    return owner
