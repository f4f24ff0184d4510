"""What a stage trains on, in which order, and what is left to say of it: pure functions of recipe and seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vlmpeft.mixture import Mixture
from vlmpeft.recipe import Stage
from vlmpeft.sampling import Measured, epoch_batches, epoch_size


@dataclass(frozen=True)
class StageData:
    """Samples of a stage and how an image file becomes a tensor."""

    train: Mixture
    held_out: Mixture
    load: Callable[[Path], Tensor]
    workers: int

    @property
    def epoch(self) -> int:
        """Samples an epoch sees."""
        return epoch_size(self.train.shares)


@dataclass(frozen=True)
class StageResult:
    """What the report says of a stage."""

    name: str
    steps: int
    seconds: float
    samples: int
    final_loss: float | None
    best_step: int | None
    trainable: list[dict[str, object]]


class Figure(Protocol):
    """A number that says how good a model is, the larger the better, found by asking it. name: "eval.pope.accuracy"."""

    @property
    def name(self) -> str: ...

    def __call__(self, stopping: Callable[[], bool]) -> float | None:
        """Returns: the number; None once `stopping` says so."""


def total_steps(stage: Stage, samples: int) -> int:
    """Optimizer steps of a stage: `optim.steps`, or `optim.epochs` over the samples an epoch sees."""
    per_epoch = math.ceil(samples / stage.batch.size)
    return stage.optim.steps or max(1, round(stage.optim.epochs * per_epoch))


def counter_seed(*counters: object) -> int:
    """A seed that depends on every counter and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, counters)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def planned(stage: Stage, samples: Measured, seed: int, first: int, last: int) -> Iterator[list[int]]:
    """Sample indices of optimizer steps `first` to `last` - 1."""
    per_epoch = math.ceil(epoch_size(samples.shares) / stage.batch.size)
    batches: list[list[int]] = []
    for step in range(first, last):
        epoch, within = divmod(step, per_epoch)
        if not batches or within == 0:
            batches = epoch_batches(samples, stage.batch.size, stage.batch.group, seed, epoch)
        yield batches[within]
