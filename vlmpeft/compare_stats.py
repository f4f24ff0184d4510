"""What right and wrong answers of several runs say: accuracy, spread over seeds, and paired differences by image."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Answered:
    """One run's answers. images: of each question. right: whether it was answered rightly."""

    seed: int
    questions: Sequence[str]
    images: Sequence[str]
    right: Sequence[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / max(1, len(self.right))


def is_right(margin: float, label: str) -> bool:
    """Whether Yes has the larger logit and the label is yes, or neither."""
    return (margin > 0) == (label == "yes")


def confidence(margins: Sequence[float], labels: Sequence[str]) -> float:
    """Mean probability of the right one of Yes and No: as accuracy, but smooth, so less noisy on few questions."""
    signs = np.where(np.asarray(labels) == "yes", 1.0, -1.0)
    return float(np.mean(0.5 * (1 + np.tanh(0.5 * signs * np.asarray(margins, np.float64)))))


def mean_accuracy(runs: Sequence[Answered]) -> float:
    """Share of right answers over all seeds' questions."""
    return sum(sum(run.right) for run in runs) / max(1, sum(len(run.right) for run in runs))


def spread(runs: Sequence[Answered]) -> float | None:
    """Standard deviation of the seeds' accuracies (n - 1 in the denominator); None for one seed."""
    return statistics.stdev(run.accuracy for run in runs) if len(runs) > 1 else None


def paired(runs: Sequence[Answered], reference: Sequence[Answered], seed: int = 0) -> dict[str, Any] | None:
    """Accuracy of `runs` minus that of `reference`, over the questions both were asked with the same seed.

    The interval is the 95 % percentile bootstrap over images: the questions about an image are not independent, nor
    are the answers of several seeds to them, so they are drawn together. Seeds are held fixed.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3; clusters as in Davison and
    Hinkley, Bootstrap Methods and their Application (1997), section 3.8.

    Returns: difference, low, high, questions, images; None if no question was asked of both.
    """
    theirs = {(run.seed, q): right for run in reference for q, right in zip(run.questions, run.right, strict=True)}
    sums: dict[str, list[int]] = {}  # of an image: sum of differences, questions
    for run in runs:
        for question, image, right in zip(run.questions, run.images, run.right, strict=True):
            if (run.seed, question) in theirs:
                cell = sums.setdefault(image, [0, 0])
                cell[0] += int(right) - int(theirs[run.seed, question])
                cell[1] += 1
    if not sums:
        return None
    table = np.asarray([sums[image] for image in sorted(sums)], np.float64)  # (images, 2)
    low, high = interval(table, seed)
    difference, count = table.sum(0)
    return {
        "difference": float(difference / count), "low": low, "high": high, "questions": int(count), "images": len(sums),
    }  # fmt: skip


def interval(table: np.ndarray[Any, Any], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The middle 95 % of sum / count over resamples of the rows (sum, count) of a table, one row an image."""
    n = len(table)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # (resamples, images)
    sums, counts = (times @ table).T
    low, high = np.quantile(sums / counts, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a figure over the runs that have it."""
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return statistics.fmean(values) if values else None
