"""Which samples a step sees: a pure function of seed and epoch, so that a position in the data is a step number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

POOL = 16  # batches whose samples are sorted by length together


class Measured(Protocol):
    """What sampling reads of samples.

    Attributes: lengths: tokens of each, images expanded. pictures: images of each. shares: (samples, weight) of each
    of the files they come from, in order.
    """

    @property
    def lengths(self) -> Sequence[int]: ...
    @property
    def pictures(self) -> Sequence[int]: ...
    @property
    def shares(self) -> Sequence[tuple[int, float]]: ...


def _repeats(count: int, weight: float) -> tuple[int, int]:
    """How often an epoch sees each of `count` samples at least, and how many of them once more."""
    whole = int(weight)
    more = round(count * (weight - whole))
    return whole, more if whole else min(count, max(1, more))


def epoch_size(shares: Sequence[tuple[int, float]]) -> int:
    """Samples an epoch sees, the same in every epoch."""
    return sum(count * whole + more for count, weight in shares for whole, more in [_repeats(count, weight)])


def epoch_samples(shares: Sequence[tuple[int, float]], seed: int, epoch: int) -> list[int]:
    """Indices of the samples an epoch sees, each `weight` times on average.

    The fractional part of a weight takes its samples from a fixed permutation, each epoch where the last one stopped:
    over the epochs no sample is seen more than once more often than another of its file.
    """
    chosen: list[int] = []
    start = 0
    for part, (count, weight) in enumerate(shares):
        rows = list(range(start, start + count))
        whole, more = _repeats(count, weight)
        chosen += rows * whole
        if more:
            random.Random(f"{seed}/weights/{part}").shuffle(rows)
            chosen += [rows[(epoch * more + i) % count] for i in range(more)]
        start += count
    return chosen


def epoch_batches(samples: Measured, size: int, group: str, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each optimizer step of an epoch: a permutation of `epoch_samples`, a pure function of its arguments.

    Args:
        size: samples a step sees over all processes.
        group: "none"; "length" puts samples of like length (image tokens counted) together; "modality" does so within
            image and text-only samples, and only the last step of an epoch may mix both.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = epoch_samples(samples.shares, seed, epoch)
    rng.shuffle(order)
    if group == "none":
        return _chunks(order, size)
    kinds, lengths, pictures = [order], samples.lengths, samples.pictures
    if group == "modality":
        kinds = [[i for i in order if pictures[i]], [i for i in order if not pictures[i]]]
    batches: list[list[int]] = []
    tails: list[list[int]] = []
    for kind in kinds:
        whole = len(kind) - len(kind) % size
        tails += [kind[whole:]] if kind[whole:] else []
        for pool in _chunks(kind[:whole], size * POOL):
            batches += _chunks(sorted(pool, key=lambda i: -lengths[i]), size)
    rng.shuffle(batches)
    if sum(map(len, tails)) <= size:  # else two short steps, each of one kind
        tails = [[i for tail in tails for i in tail]] if tails else []
    return batches + tails


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def micro_batches(step: Sequence[int], micro: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """A process's share of a step, in forwards of at most `micro` neighbours of it.

    Every process gets as many forwards; a step with fewer samples than processes leaves some of them empty.
    """
    forwards = max(1, -(-len(step) // (micro * world)))
    share = list(step[rank::world])
    cuts = [i * len(share) // forwards for i in range(forwards + 1)]
    return [share[start:end] for start, end in pairwise(cuts)]
