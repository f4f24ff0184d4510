"""Which image tokens are steered, out of the mask of all of them. Letters: b batch, s sequence, n tokens of one image.

A choice is a pure function of an image's tokens: it acts on every image of a row by itself, whatever the padding, and a
row without an image has none. An image is a run of placeholders; where images touch, their `sizes` part them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmpeft.errors import ConfigError

NAMES = "all, ratio:P, first_last:N,M, uniform:N, random:SEED or random:P,SEED"
SHARE = 0.01  # of the image tokens, as published, where none is given


@dataclass(frozen=True)
class Places:
    """Where every token stands in its image.

    rank: (b, s) int64, from 0. size: (b, s) tokens of its image; 0 outside.
    """

    rank: Tensor
    size: Tensor


def row_places(mask: Tensor) -> Places:
    """The place of every token of a mask (b, s) among all those of its row, as LoReFT counts the prompt's."""
    size = mask.sum(1, keepdim=True).expand(mask.shape)
    return Places(torch.where(mask, mask.long().cumsum(1) - 1, 0), torch.where(mask, size, 0))


def places(visual: Tensor, sizes: Sequence[int] | None = None) -> Places:
    """The place of every image token. No value is read back from the device.

    Args:
        visual: (b, s) bool, image placeholders.
        sizes: tokens of every image in order, all of `visual`; None takes runs of placeholders for images.
    """
    if sizes is not None and len(set(sizes)) > 1:
        return _places_of_sizes(visual, sizes)
    width = visual.shape[1]
    index = torch.arange(width, device=visual.device).expand_as(visual)
    before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    after = torch.nn.functional.pad(visual, (0, 1))[:, 1:]
    start = torch.where(visual & ~before, index, -1).cummax(1).values  # (b, s) where the run of a token starts
    end = torch.where(visual & ~after, index, width).flip(1).cummin(1).values.flip(1)
    rank, size = index - start, end - start + 1
    if sizes:
        rank, size = rank % sizes[0], torch.full_like(size, sizes[0])
    return Places(torch.where(visual, rank, 0), torch.where(visual, size, 0))


def _places_of_sizes(visual: Tensor, sizes: Sequence[int]) -> Places:
    """`places` of images that differ in size: worked out on the host, then looked up by the number of the token."""
    counts = torch.tensor(sizes)
    table = torch.stack([torch.cat([torch.arange(n) for n in sizes]), counts.repeat_interleave(counts)])  # (2, tokens)
    if visual.device.type == "cuda":
        table = table.pin_memory()  # a copy from other memory would wait for the device
    rank, size = table.to(visual.device, non_blocking=True)
    number = (visual.flatten().cumsum(0) - 1).view_as(visual).clamp(0, len(rank) - 1)
    return Places(torch.where(visual, rank[number], 0), torch.where(visual, size[number], 0))


Choice = Callable[[Places], Tensor]  # -> (b, s) bool, to be read at image tokens only


def chosen(choice: Choice, visual: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """The image tokens that `choice` takes. Args: see `places`. Returns: (b, s) bool."""
    return choice(places(visual, sizes)) & visual


def chosen_in_rows(choice: Choice, mask: Tensor) -> Tensor:
    """The tokens of a mask (b, s) that `choice` takes, each row as one run. Returns: (b, s) bool."""
    return choice(row_places(mask)) & mask


def everything(place: Places) -> Tensor:
    """All tokens of every image."""
    return place.size > 0


def nothing(place: Places) -> Tensor:
    """No token: the control of a series of shares."""
    return torch.zeros_like(place.size, dtype=torch.bool)


def spread(count: Tensor, place: Places) -> Tensor:
    """`count` tokens of each image at equal distances: floor((i + 0.5) n / count), i = 0 ... count - 1.

    Token t is one of them if the first i with floor((i + 0.5) n / count) >= t gives t itself.
    Args: count: (b, s) int64, from 1 to n.
    """
    count, size = count.clamp_min(1), place.size.clamp_min(1)
    # floor((2i + 1) n / 2c) >= t  <=>  (2i + 1) n >= 2 c t  <=>  i >= (2 c t / n - 1) / 2
    i = (-((size - 2 * count * place.rank) // (2 * size))).clamp_min(0)  # the ceiling, in integers
    return (i < count) & ((2 * i + 1) * size // (2 * count) == place.rank)


def ratio(share: float) -> Choice:
    """max(1, round(share n)) tokens of each image, evenly spread; none for a share of 0."""
    if share == 0:
        return nothing
    return lambda place: spread((place.size * share).round().long().clamp_min(1), place)


def uniform(count: int) -> Choice:
    """At most `count` tokens of each image, evenly spread."""
    return lambda place: spread(place.size.clamp(max=count), place)


def first_last(first: int, last: int) -> Choice:
    """The first and the last tokens of each image, at most half of it each. Source: LLaVA-Steering `f4+l5`."""

    def choose(place: Places) -> Tensor:
        half = place.size // 2
        return (place.rank < half.clamp(max=first)) | (place.rank >= place.size - half.clamp(max=last))

    return choose


def random(share: float, seed: int) -> Choice:
    """max(1, round(share n)) tokens of each image, the same ones in every image of n tokens: drawn once by `seed`."""

    def choose(place: Places) -> Tensor:
        keys = _hash(place.rank, seed)  # (b, s); an order of 0 ... n - 1 that depends on the seed alone
        others = torch.arange(place.rank.shape[1], device=place.rank.device)
        smaller = (_hash(others, seed) < keys[..., None]) & (others < place.size[..., None])  # (b, s, s)
        return smaller.sum(-1) < (place.size * share).round().clamp_min(1)

    return choose


def _hash(rank: Tensor, seed: int) -> Tensor:
    """A permutation of small integers: multiply-xorshift mixing of splitmix32 (injective on 32 bits)."""
    mask = 0xFFFFFFFF
    x = (rank + (seed + 1) * 0x9E3779B9) & mask
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor & mask
    return x ^ (x >> 15)


def parse(text: str) -> Choice:
    """A choice from its name in a recipe. Raises: ConfigError C102 with the names there are."""
    patterns: list[tuple[str, Callable[..., Choice]]] = [
        (r"all", lambda: everything),
        (r"ratio:([\d.]+)", lambda p: ratio(_share(p, text, 0.0))),
        (r"first_last:(\d+),(\d+)", lambda n, m: _ends(int(n), int(m), text)),
        (r"uniform:(\d+)", lambda n: uniform(_count(int(n), text))),
        (r"random:(\d+)", lambda seed: random(SHARE, int(seed))),
        (r"random:([\d.]+),(\d+)", lambda p, seed: random(_share(p, text), int(seed))),
    ]
    for pattern, make in patterns:
        if match := re.fullmatch(pattern, text.replace(" ", "")):
            return make(*match.groups())
    raise ConfigError("C102", f"positions='{text}' is no choice of image tokens.", f"use {NAMES}.")


def _share(text: str, whole: str, none: float | None = None) -> float:
    """A share from its text. Args: none: the one below the range that is allowed too."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value != none and not 0 < value <= 1:
        raise ConfigError("C102", f"positions='{whole}': {text} is no share.", "use a number above 0, at most 1.")
    return value


def _ends(first: int, last: int, whole: str) -> Choice:
    _count(first + last, whole)
    return first_last(first, last)


def _count(tokens: int, whole: str) -> int:
    if tokens < 1:
        raise ConfigError("C102", f"positions='{whole}' takes no token.", "use at least 1.")
    return tokens
