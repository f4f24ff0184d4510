"""The answer loss. Letters: b batch, s sequence, m supervised tokens, v vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, labels: Tensor, index: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross entropy of supervised tokens, in fp32.

    Args:
        logits: (m, v), at the positions that predict a supervised token.
        labels: (b, s), unshifted.
        index: (m,) flat position of each row of `logits` in (b * s).
        num_items: divisor of the sum; None takes m. Dividing micro-batches by the supervised tokens of the whole
            optimizer step makes accumulation equal to one big batch.

    Returns: a scalar; 0 (with a graph) when nothing is supervised.
    """
    targets = labels.flatten()[index + 1]
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (max(len(index), 1) if num_items is None else num_items)
