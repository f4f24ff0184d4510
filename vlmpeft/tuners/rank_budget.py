"""Which singular values of AdaLoRA stay (arXiv:2303.10512), decided as peft's RankAllocator decides.

Letters: r rank of a layer, d_in d_out widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

SENSITIVITY, UNCERTAINTY = "sensitivity", "uncertainty"


def fresh(parameter: Tensor) -> dict[str, Tensor]:
    """What is known of the entries of a parameter before the first step."""
    return {SENSITIVITY: torch.zeros_like(parameter), UNCERTAINTY: torch.zeros_like(parameter)}


@torch.no_grad()
def observe(known: Mapping[str, Tensor], parameter: nn.Parameter, betas: tuple[float, float]) -> None:
    """Smooth the sensitivity |w dL/dw| of every entry and how much it wavers (eq. 8 to 10), in place."""
    if parameter.grad is None:
        return
    now, (smooth, wavers) = (parameter * parameter.grad).abs(), (known[SENSITIVITY], known[UNCERTAINTY])
    smooth.mul_(betas[0]).add_(now, alpha=1 - betas[0])
    wavers.mul_(betas[1]).add_((now - smooth).abs(), alpha=1 - betas[1])


def score(known: Mapping[str, Tensor]) -> Tensor:
    """Importance of every entry (eq. 11)."""
    return known[SENSITIVITY] * known[UNCERTAINTY]


def triplet_scores(a: Tensor, e: Tensor, b: Tensor) -> Tensor:
    """(r,) importance of each singular value with its vectors (eq. 7).

    Args: of the entries: a (r, d_in), e (r, 1), b (d_out, r).
    """
    return e.flatten() + a.mean(1) + b.mean(0)


def budget(step: int, first: int, last: int, start: int, target: int) -> int:
    """How many singular values all layers may have (eq. 12): from `start` to `target` along a cubic curve.

    Args: step: from 0; first, last: the last step before it falls, and the step at which it is down.
    """
    if step <= first:
        return start
    if step >= last:
        return target
    left = 1 - (step - first) / (last - first)
    return int((start - target) * left**3 + target)


def kept(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """(r, 1) bool by layer: the `count` most important of all layers; of equal ones at the border none."""
    every = torch.cat(list(scores))
    surplus = len(every) - count
    if surplus <= 0:
        return [torch.ones_like(s, dtype=torch.bool)[:, None] for s in scores]
    threshold = torch.kthvalue(every, surplus).values
    return [(s > threshold)[:, None] for s in scores]
