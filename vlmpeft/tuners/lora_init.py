"""Where A and B of a LoRA start, other than at Kaiming and zero. Letters: r rank, d_in d_out widths."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmpeft.errors import ModelError


@torch.no_grad()
def principal(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Scale * B A is the best rank-r part of the weight, in fp32, as in PiSSA's start (arXiv:2404.02948 eq. 2-3).

    Args: weight (d_out, d_in). Returns: A (r, d_in), B (d_out, r), the singular values halved between them.
    Raises: ModelError M551 if the weight has fewer singular values than r.
    """
    if r > min(weight.shape):
        message = f"init=pissa or loftq takes r={r} singular values of a weight {tuple(weight.shape)}."
        raise ModelError("M551", message, f"set r to at most {min(weight.shape)}.")
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return root[:, None] * vh[:r].contiguous(), u[:, :r].contiguous() * root


@torch.no_grad()
def orthogonal_(a: Tensor, b: Tensor) -> None:
    """Fill A (r, d_in) and B (d_out, r) so that neither is zero but B A is, up to rounding; r is even.

    Their r-wide sides lie in two halves of one random orthonormal basis. Source: peft's `orthogonal_init`.
    """
    r = len(a)
    basis = torch.linalg.qr(torch.randn(r, r, device=a.device))[0]
    a.copy_((torch.randn(a.shape[1], r // 2, device=a.device) @ basis[0::2]).T / 10)
    b.copy_(torch.randn(r // 2, len(b), device=a.device).T @ basis[1::2] / 10)
