"""How far the choice of questions alone moves a score: a 95 % bootstrap interval of a mean, without drawing."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

TAIL = 0.025
Z = 1.959964  # of the normal distribution at 1 - TAIL


def interval(scores: Sequence[float]) -> list[float]:
    """[low, high]: the middle 95 % of the means of resamples of `scores`, each in [0, 1]; [0, 0] of none.

    Computed, not drawn, so the same for every seed and order of the questions. The number of right answers in a
    resample of right-or-wrong ones is binomial; graded scores take the Cornish-Fisher expansion to the skewness.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; Hall, The Bootstrap and
    Edgeworth Expansion, 1992, section 2.5.
    """
    n = len(scores)
    if n == 0:
        return [0.0, 0.0]
    if all(score in (0, 1) for score in scores):
        return [k / n for k in _binomial_middle(n, round(sum(scores)))]
    mean = math.fsum(scores) / n
    variance, third = (math.fsum((score - mean) ** power for score in scores) / n for power in (2, 3))
    error = math.sqrt(variance / n)
    shift = third / (6 * n * variance) * (Z * Z - 1) if variance else 0.0
    return [max(0.0, mean - Z * error + shift), min(1.0, mean + Z * error + shift)]


def _binomial_middle(n: int, right: int) -> tuple[int, int]:
    """The quantiles at TAIL and 1 - TAIL of the successes in n trials of probability right / n."""
    if right in (0, n):
        return right, right
    p, factorial = right / n, [math.lgamma(k + 1) for k in range(n + 1)]
    logs = (
        factorial[n] - factorial[k] - factorial[n - k] + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(n + 1)
    )
    reached = list(accumulate(map(math.exp, logs)))
    return bisect_left(reached, TAIL), min(n, bisect_left(reached, 1 - TAIL))
