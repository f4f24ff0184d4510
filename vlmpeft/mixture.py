"""Samples of several files as one sequence, each file with a weight."""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlmpeft.sample_store import Sample, SampleStore


class Mixture(Sequence[Sample]):
    """Samples of files in order, or a choice of them; one is read when it is asked for.

    Args:
        stores: the files.
        weights: how often an epoch sees each sample of a file.
        rows: chosen positions in the files' concatenation, ascending; None for all.

    Attributes: lengths, pictures: tokens and images of each sample. shares: (samples, weight) of each file.
    """

    def __init__(self, stores: Sequence[SampleStore], weights: Sequence[float], rows: Any | None = None) -> None:
        self.stores, self.weights = tuple(stores), tuple(weights)
        self._starts = list(accumulate((len(store) for store in stores), initial=0))
        self.rows = np.arange(self._starts[-1]) if rows is None else np.asarray(rows, np.int64)
        self.lengths = array("i", self._gathered([store.lengths for store in stores]).tobytes())
        self.pictures = array("i", self._gathered([store.pictures for store in stores]).tobytes())
        cuts = np.searchsorted(self.rows, self._starts).tolist()
        self.shares = [(end - start, weight) for (start, end), weight in zip(pairwise(cuts), weights, strict=True)]

    def __reduce__(self) -> tuple[type[Mixture], tuple[Any, ...]]:
        return Mixture, (self.stores, self.weights, self.rows)

    def _gathered(self, columns: Sequence[Any]) -> Any:
        return np.concatenate(columns).astype(np.int32)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        file, row = self.place(index)
        return self.stores[file][row]

    def place(self, index: int) -> tuple[int, int]:
        """The file of a sample and its row there, both from 0."""
        row = int(self.rows[index])
        file = bisect_right(self._starts, row) - 1
        return file, row - self._starts[file]

    def take(self, indices: Sequence[int]) -> Mixture:
        """The samples at ascending indices."""
        return Mixture(self.stores, self.weights, self.rows[np.asarray(indices, np.int64)])

    @property
    def supervised(self) -> int:
        """Answer tokens of all samples."""
        return int(self._gathered([store.supervised for store in self.stores]).sum())

    @property
    def cut(self) -> int:
        """How many samples did not fit into data.max_length."""
        return int((self._gathered([store.cut for store in self.stores]) > 0).sum())

    def images(self) -> Iterator[Path]:
        """Every image file of the files' samples, chosen or not."""
        return (path for store in self.stores for path in store.images())


def split_held_out(samples: Mixture, share: float, seed: int) -> tuple[Mixture, Mixture]:
    """Training and held-out samples, chosen by seed. At least one stays on each side when a share is asked for."""
    order = list(range(len(samples)))
    if share == 0:
        return samples, samples.take([])
    random.Random(f"{seed}/held-out").shuffle(order)
    count = min(max(1, round(share * len(samples))), len(samples) - 1)
    return samples.take(sorted(order[count:])), samples.take(sorted(order[:count]))


def supervised_share(samples: Mixture) -> tuple[int, int]:
    """(supervised tokens, all tokens) of samples."""
    return samples.supervised, sum(samples.lengths)
