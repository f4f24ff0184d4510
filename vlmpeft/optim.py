"""Parameter groups, one or two a tuner, and the learning-rate schedule. AdamW is torch's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from vlmpeft.tune import Tuned

Schedule = Literal["cosine", "linear", "constant"]


def lr_factor(step: int, total: int, warmup_ratio: float, schedule: Schedule) -> float:
    """Factor on the learning rate of optimizer step `step` (from 0).

    Rises linearly over ceil(warmup_ratio * total) steps from 0, then falls to 0 at `total`, as
    transformers' get_cosine_schedule_with_warmup. Source of the cosine: arXiv:1608.03983 eq. 5.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return step / warmup
    if schedule == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    done = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))) if schedule == "cosine" else 1.0


def parameter_groups(tuned: Tuned, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the optimizer: per tuner its learning rate; biases and one-dimensional tensors (norms) do not decay.

    Returns: groups with "name", "peak_lr", "lr", "weight_decay", "params" and "parameter_names", each trainable once.
    """
    groups: list[dict[str, Any]] = []
    for name, parameters in tuned.claims().items():
        peak = tuned.applied[name].tuner.lr or lr
        for decays in (True, False):
            chosen = {k: p for k, p in parameters.items() if (p.ndim > 1) is decays}
            if chosen:
                groups.append(_group(name, peak, weight_decay if decays else 0.0, chosen))
    return groups


def _group(name: str, peak: float, decay: float, chosen: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    return {
        "name": name,
        "peak_lr": peak,
        "lr": 0.0,
        "weight_decay": decay,
        "params": list(chosen.values()),
        "parameter_names": list(chosen),
    }


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """torch's AdamW on these groups."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give every group its peak times `factor`. Returns: learning rate by tuner."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
