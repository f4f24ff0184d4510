"""Which samples a step sees: permutations, modality, padding, and the shares of several processes."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

import pytest

from vlmpeft.sampling import epoch_batches, epoch_samples, epoch_size, micro_batches


@dataclass(frozen=True)
class Items:
    lengths: list[int]
    pictures: list[int]
    shares: list[tuple[int, float]]

    def __len__(self) -> int:
        return len(self.lengths)


def items(rows: list[tuple[int, int]]) -> Items:
    """Samples of one file. Args: rows: length and number of images of each."""
    return Items([n for n, _ in rows], [i for _, i in rows], [(len(rows), 1.0)])


def mix(images: int, texts: int, seed: int = 0) -> Items:
    """Samples in random order; an image takes 40 tokens beside its text."""
    rng = random.Random(seed)
    rows = [(40 + rng.randint(1, 60), 1) for _ in range(images)] + [(rng.randint(1, 200), 0) for _ in range(texts)]
    rng.shuffle(rows)
    return items(rows)


MIXES = [(64, 0), (0, 64), (999, 1), (1, 999), (50, 50), (13, 7), (12, 12), (9, 8), (1, 1), (1, 0), (8, 8), (15, 15)]


def kinds(samples: Items, step: list[int]) -> set[bool]:
    return {bool(samples.pictures[i]) for i in step}


@pytest.mark.parametrize("group", ["none", "length", "modality"])
@pytest.mark.parametrize(("images", "texts"), MIXES)
def test_epoch_is_a_permutation_fixed_by_seed_and_epoch(images: int, texts: int, group: str) -> None:
    samples = mix(images, texts)
    for size in (1, 8):
        steps = epoch_batches(samples, size, group, seed=1, epoch=2)
        assert sorted(i for step in steps for i in step) == list(range(len(samples)))
        assert len(steps) == math.ceil(len(samples) / size)  # the loop counts steps so
        assert all(0 < len(step) <= size for step in steps)
        assert steps == epoch_batches(samples, size, group, seed=1, epoch=2)
    if len(samples) > 20:
        others = [epoch_batches(samples, 8, group, seed, epoch) for seed, epoch in ((1, 3), (2, 2), (12, 2), (1, 22))]
        assert len({str(o) for o in [*others, steps]}) == 5


@pytest.mark.parametrize(("images", "texts"), MIXES)
@pytest.mark.parametrize("size", [2, 8])
def test_every_step_but_the_last_is_of_one_modality(images: int, texts: int, size: int) -> None:
    samples = mix(images, texts)
    for epoch in range(4):
        steps = epoch_batches(samples, size, "modality", seed=0, epoch=epoch)
        assert all(len(kinds(samples, step)) == 1 for step in steps[:-1])
        assert all(len(step) == size for step in steps[:-2])
        rest = images % size + texts % size
        if 0 < rest <= size:  # what is left of both fits into one step
            assert len(steps[-1]) == rest


def waste(samples: Items, steps: list[list[int]], micro: int) -> int:
    """Padded positions over all forwards."""
    total = 0
    for step in steps:
        for forward in micro_batches(step, micro):
            lengths = [samples.lengths[i] for i in forward]
            total += max(lengths) * len(lengths) - sum(lengths)
    return total


@pytest.mark.parametrize("group", ["length", "modality"])
@pytest.mark.parametrize(("images", "texts"), [(300, 0), (200, 100)])
def test_grouping_pads_far_less_than_chance(images: int, texts: int, group: str) -> None:
    samples = mix(images, texts)
    chance = waste(samples, epoch_batches(samples, 8, "none", 0, 0), 4)
    assert waste(samples, epoch_batches(samples, 8, group, 0, 0), 4) < 0.4 * chance


def test_image_tokens_count_as_length() -> None:
    """Two texts of one token and two of 100, one of each with an image of 100 tokens: by total length they pair up."""
    texts = {0: 1, 1: 101, 2: 101, 3: 201}
    samples = items([(n, int(i in (1, 3))) for i, n in texts.items()])
    for epoch in range(8):
        steps = epoch_batches(samples, 2, "length", 0, epoch)
        assert sorted(sorted(samples.lengths[i] for i in step) for step in steps) == [[1, 101], [101, 201]]


def test_steps_of_like_length_come_in_random_order() -> None:
    samples = mix(200, 0)
    firsts = [samples.lengths[s[0]] for s in epoch_batches(samples, 8, "length", 0, 0)]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_processes_share_every_sample_exactly_once(world: int, micro: int) -> None:
    for count in range(1, 14):
        step = random.Random(count).sample(range(100), count)
        shares = [micro_batches(step, micro, rank, world) for rank in range(world)]
        assert sorted(i for share in shares for forward in share for i in forward) == sorted(step)
        assert len({len(share) for share in shares}) == 1
        assert all(len(forward) <= micro for share in shares for forward in share)
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_forward_holds_neighbours_of_the_step() -> None:
    assert micro_batches([9, 8, 7, 6, 5, 4, 3], 3) == [[9, 8], [7, 6], [5, 4, 3]]
    assert micro_batches([9, 8, 7, 6], 4, rank=1, world=2) == [[8, 6]]
    assert micro_batches([9], 4, rank=1, world=2) == [[]]


SHARES = [(10, 1.0), (4, 2.5), (7, 0.3), (3, 2.0), (5, 0.01)]


def test_weight_is_how_often_a_sample_is_seen_an_epoch_on_average() -> None:
    epochs = [Counter(epoch_samples(SHARES, 1, epoch)) for epoch in range(70)]
    starts = [0, 10, 14, 21, 24, 29]
    for part, (count, weight) in enumerate(SHARES):
        rows = range(starts[part], starts[part + 1])
        seen = [sum(epoch[i] for epoch in epochs) for i in rows]
        a_time = max(1, round(count * weight)) if weight < 1 else count * weight  # at least one sample of every file
        assert sum(seen) == 70 * a_time
        assert max(seen) - min(seen) <= 1
        assert all(int(weight) <= epoch[i] <= int(weight) + 1 for epoch in epochs for i in rows)


def test_every_epoch_has_the_same_size_and_is_fixed_by_seed_and_epoch() -> None:
    drawn = {(seed, epoch): epoch_samples(SHARES, seed, epoch) for seed in (1, 2) for epoch in (0, 1)}
    assert {len(rows) for rows in drawn.values()} == {epoch_size(SHARES)} == {10 + 10 + 2 + 6 + 1}
    assert len({tuple(rows) for rows in drawn.values()}) == 4
    assert epoch_samples(SHARES, 2, 1) == drawn[2, 1]
    assert epoch_samples([(6, 1.0)], 0, 3) == list(range(6))


@pytest.mark.parametrize("group", ["none", "length", "modality"])
def test_batches_hold_what_the_weights_ask_for(group: str) -> None:
    samples = mix(20, 9)
    weighted = Items(samples.lengths, samples.pictures, SHARES)
    steps = epoch_batches(weighted, 4, group, seed=3, epoch=5)
    assert sorted(i for step in steps for i in step) == sorted(epoch_samples(SHARES, 3, 5))
    assert len(steps) == math.ceil(epoch_size(SHARES) / 4)
