"""The edit of a few rows of hidden states, with a backward pass that copies the gradient once.

Letters: b batch, s sequence, d width, r rank, p edited positions of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LowRankEdit(torch.autograd.Function):
    """hidden[index] += keep * (up (down hidden[index] + bias)), everything but the sum in the dtype of `up`.

    Composed of PyTorch's own operations, gathering and adding each give a gradient of the size of `hidden`, which then
    are summed: three passes over all tokens for the sake of a few. Here the gradient passes through, and p rows of a
    copy change.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, index: Tensor, up: Tensor, down: Tensor, bias: Tensor, keep: Tensor | None
    ) -> Tensor:
        """Args: hidden (b, s, d); index (p,) flat; up (d, r); down (r, d); bias (r,); keep (p, d) or None for 1."""
        rows = hidden.flatten(0, 1).index_select(0, index).to(up.dtype)  # (p, d)
        low = torch.addmm(bias, rows, down.T)  # (p, r)
        ctx.save_for_backward(index, up, down, rows, low, keep)
        delta = low @ up.T if keep is None else low @ up.T * keep
        return hidden.flatten(0, 1).index_add(0, index, delta.to(hidden.dtype)).view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, up, down and bias. Args: gradient (b, s, d)."""
        index, up, down, rows, low, keep = ctx.saved_tensors
        flat = gradient.flatten(0, 1)
        of_delta = flat.index_select(0, index).to(up.dtype)
        if keep is not None:
            of_delta = of_delta * keep
        of_low = of_delta @ up
        of_hidden = None
        if ctx.needs_input_grad[0]:
            of_hidden = flat.index_add(0, index, (of_low @ down).to(gradient.dtype)).view(gradient.shape)
        return of_hidden, None, of_delta.T @ low, of_low.T @ rows, of_low.sum(0), None
