"""Which samples a step sees: permutations, modality, padding, and the shares of several processes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlmpeft.sampling import epoch_batches, micro_batches

IMAGE = (Path("a.png"),)


@dataclass(frozen=True)
class Item:
    input_ids: tuple[int, ...]
    images: tuple[Path, ...]


def mix(images: int, texts: int, seed: int = 0) -> list[Item]:
    """Samples in random order; an image takes 40 tokens beside its text."""
    rng = random.Random(seed)
    items = [Item((0,) * (40 + rng.randint(1, 60)), IMAGE) for _ in range(images)]
    items += [Item((0,) * rng.randint(1, 200), ()) for _ in range(texts)]
    rng.shuffle(items)
    return items


MIXES = [(64, 0), (0, 64), (999, 1), (1, 999), (50, 50), (13, 7), (12, 12), (9, 8), (1, 1), (1, 0), (8, 8), (15, 15)]


def kinds(samples: list[Item], step: list[int]) -> set[bool]:
    return {bool(samples[i].images) for i in step}


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


def waste(samples: list[Item], steps: list[list[int]], micro: int) -> int:
    """Padded positions over all forwards."""
    total = 0
    for step in steps:
        for forward in micro_batches(step, micro):
            lengths = [len(samples[i].input_ids) for i in forward]
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
    samples = [Item((0,) * n, IMAGE if i in (1, 3) else ()) for i, n in texts.items()]
    for epoch in range(8):
        steps = epoch_batches(samples, 2, "length", 0, epoch)
        assert sorted(sorted(len(samples[i].input_ids) for i in step) for step in steps) == [[1, 101], [101, 201]]


def test_steps_of_like_length_come_in_random_order() -> None:
    samples = mix(200, 0)
    firsts = [len(samples[s[0]].input_ids) for s in epoch_batches(samples, 8, "length", 0, 0)]
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
