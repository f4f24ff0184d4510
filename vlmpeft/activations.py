"""What a forward keeps for its backward, and what it computes, counted on shapes.

Letters: b batch, s sequence, d width, m supervised tokens, v vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlmpeft.fake_model import Kernels

OUTSIDE = -1  # the number of what is in no block


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward keeps until its backward, every storage once, without weights and inputs.

    Args:
        blocks: of each block. outside: of all else but the logits. casts: copies of trained weights in the run's
            precision, which autocast keeps. logits: of the head's outputs. entry: of what goes into a block.
    """

    blocks: tuple[int, ...]
    outside: int
    casts: int
    logits: int
    entry: int

    def total(self, checkpointing: bool) -> int:
        """Without casts and logits. Args: checkpointing: keep what goes into each block, and one block's own."""
        inside = len(self.blocks) * self.entry + max(self.blocks) if checkpointing else sum(self.blocks)
        return self.outside + inside


def storage_key(tensor: Tensor) -> int:
    """What tensors that share memory have in common, as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


class Casts(TorchDispatchMode):
    """Notes the copies of tensors in another dtype. Attributes: made: their storages, which `held` keeps alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.made = {storage_key(t) for t in tensors}
        self.held: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and storage_key(args[0]) in self.made:
            self.held.append(out)
            self.made.add(storage_key(out))
        return out


class KeptCounter:
    """Notes what autograd saves, by the block that runs.

    Args: blocks: in order. weights: tensors that are there anyway. trained: those whose casts count apart.
    """

    def __init__(self, blocks: Sequence[nn.Module], weights: Sequence[Tensor], trained: Sequence[Tensor]) -> None:
        self.blocks = blocks
        self.seen = {storage_key(t): t for t in weights}
        self.casts = Casts(trained)
        self.now, self.entry = OUTSIDE, 0
        self.kept: list[tuple[int, Tensor]] = []

    def _save(self, tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in self.seen:
            self.seen[storage_key(tensor)] = tensor
            self.kept.append((self.now, tensor))
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the block."""
        hooks: list[Any] = []
        for number, block in enumerate(self.blocks):
            hooks.append(block.register_forward_pre_hook(self._enter(number), with_kwargs=True))
            hooks.append(block.register_forward_hook(self._leave))
        try:
            with self.casts, torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, number: int) -> Any:
        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.now, self.entry = number, hidden.numel() * hidden.element_size()

        return enter

    def _leave(self, *_: Any) -> None:
        self.now = OUTSIDE

    def result(self, logits: int) -> Kept:
        """What was kept. Args: logits: m * v, by which they are known."""
        found: dict[object, int] = {}
        for number, tensor in self.kept:
            kind: object = number
            if storage_key(tensor) in self.casts.made:
                kind = "casts"
            elif number == OUTSIDE and tensor.numel() == logits:
                kind = "logits"
            found[kind] = found.get(kind, 0) + tensor.untyped_storage().nbytes()
        blocks = tuple(found.get(number, 0) for number in range(len(self.blocks)))
        return Kept(blocks, found.get(OUTSIDE, 0), found.get("casts", 0), found.get("logits", 0), self.entry)


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions. A backward of attention makes five products where its forward makes two."""

    forward: int
    backward: int


def count(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: dict[str, Tensor], kernels: Kernels, dtype: torch.dtype
) -> tuple[Kept, Flops]:
    """Run a forward and a backward of a model of fake tensors, under autocast if `dtype` is bf16."""
    parameters = list(model.parameters())
    there = [*parameters, *model.buffers(), *inputs.values()]
    counter = KeptCounter(blocks, there, [p for p in parameters if p.requires_grad])
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with kernels, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with forward, counter.counting():
            out: Any = model(**inputs)
        attention = kernels.flops
        with backward:
            out.loss.backward()
    flops = forward.get_total_flops() + attention, backward.get_total_flops() + attention * 5 // 2
    return counter.result(out.logits.numel()), Flops(*flops)


class Live(TorchDispatchMode):
    """How many bytes the tensors made inside take at most at one time. Args: there: tensors that were there before."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {storage_key(tensor) for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage_key(tensor), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
