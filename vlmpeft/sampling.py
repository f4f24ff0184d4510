"""Which samples a step sees: a pure function of seed and epoch, so that a position in the data is a step number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

POOL = 16  # batches whose samples are sorted by length together


class Sized(Protocol):
    """What sampling reads of a sample: its tokens, images expanded, and whether it has images."""

    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def images(self) -> Sequence[Path]: ...


def epoch_batches(samples: Sequence[Sized], size: int, group: str, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each optimizer step of an epoch: a permutation of all samples, a pure function of its arguments.

    Args:
        size: samples a step sees over all processes.
        group: "none"; "length" puts samples of like length (image tokens counted) together; "modality" does so within
            image and text-only samples, and only the last step of an epoch may mix both.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(samples)))
    rng.shuffle(order)
    if group == "none":
        return _chunks(order, size)
    kinds = [order]
    if group == "modality":
        kinds = [[i for i in order if samples[i].images], [i for i in order if not samples[i].images]]
    batches: list[list[int]] = []
    tails: list[list[int]] = []
    for kind in kinds:
        whole = len(kind) - len(kind) % size
        tails += [kind[whole:]] if kind[whole:] else []
        for pool in _chunks(kind[:whole], size * POOL):
            batches += _chunks(sorted(pool, key=lambda i: -len(samples[i].input_ids)), size)
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
