"""Ratios of samples to one figure a layer, with how sure it is. Letters: n samples, l layers, r resamples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Summary:
    """Of (n, l) values, in fp64, (l,) each. low, high: 95 % interval of the mean. NaN where no sample has a value."""

    mean: Tensor
    median: Tensor
    low: Tensor
    high: Tensor


def summarise(values: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Summary:
    """Mean and median over samples, NaN left out, and the percentile bootstrap interval of the mean.

    Args: values (n, l). Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    values = values.double()
    n, layers = values.shape
    if n == 0:
        nothing = torch.full((layers,), torch.nan, dtype=torch.float64)
        return Summary(nothing, nothing, nothing, nothing)
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    means = (times @ values.nan_to_num()) / (times @ (~values.isnan()).double())  # (r, l)
    low, high = torch.nanquantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return Summary(values.nanmean(0), torch.nanquantile(values, 0.5, dim=0), low, high)


def numbers(values: Tensor) -> list[float | None]:
    """(l,) as JSON has it: None for what is not finite, six digits of the others."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]
