"""A model that computes shapes alone: its tensors have a device and a dtype, and no memory behind them.

Fake tensors of the CPU are used, not those of the meta device, which knows no autocast: what a run in bf16 keeps is in
bf16 only where autocast casts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: query, key, value, output, the log-sum-exp of every row, and the mask as
    a bias in the dtype of the query, which every call makes anew."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(b, h, t, d), (b, g, s, d), (b, g, s, e) and a mask of any shape -> (b, h, t, e)."""
        b, heads, rows, _ = query.shape
        out = query.new_empty(b, rows, heads, value.shape[-1]).transpose(1, 2)  # as the kernels lay it out
        bias = None if mask is None else query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32), bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of the shapes of query, key and value."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class Dropout(torch.autograd.Function):
    """What dropout keeps on an accelerator: a mask of one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x of any shape -> the same."""
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """A gradient of the same shape."""
        return torch.empty_like(grad)


class Kernels(TorchFunctionMode):
    """Puts the above in the place of what the CPU would do, and counts the attention's products.

    Args: count: what a number asked of a tensor is; every condition on values holds.
    Attributes: flops: of attention, forward.
    """

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.count, self.flops = count, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value, mask = _attention(*args, **kwargs)
            out = FusedAttention.apply(query, key, value, mask)
            self.flops += 2 * out.numel() * value.shape[2] + 2 * query.numel() * value.shape[2]
            return out
        if func is F.dropout:
            return Dropout.apply(args[0]) if _drops(*args, **kwargs) else args[0]
        if func in (torch.Tensor.__int__, torch.Tensor.__bool__, torch.Tensor.item):
            return True if args[0].dtype == torch.bool else self.count
        return func(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors of a call as scaled_dot_product_attention takes it."""
    return query, key, value, attn_mask


def _drops(_input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    """Whether a call as F.dropout takes it drops anything."""
    return training and p > 0


@contextlib.contextmanager
def shapes_only(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Inside, the tensors of a model on the meta device are fake ones of the CPU, and new ones are fake too."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made: dict[int, Any] = {}

        def fake(tensor: Tensor, wrap: Callable[[Tensor], Tensor]) -> Any:
            if id(tensor) not in made:  # a tied tensor is one
                made[id(tensor)] = wrap(torch.empty(tensor.shape, dtype=tensor.dtype)), tensor
            return made[id(tensor)][0]

        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                setattr(module, name, fake(parameter, lambda t: nn.Parameter(t, requires_grad=False)))
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                setattr(module, name, fake(buffer, lambda t: t))
        yield mode
