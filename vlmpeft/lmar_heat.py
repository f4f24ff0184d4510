"""Attention of one answer token over the photo it is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from PIL import Image
from torch import Tensor

from vlmpeft.build import Bundle
from vlmpeft.encoder import Encoder
from vlmpeft.errors import ConfigError
from vlmpeft.images import ImageReader
from vlmpeft.lmar_samples import Shown, answers, run
from vlmpeft.projectors.base import Grid, Projector, output_grid
from vlmpeft.steering.pictures import Heat
from vlmpeft.steering.probe import image_attention

SIDE = 900  # most pixels of a photo's longer side in a figure


@dataclass(frozen=True)
class Chosen:
    """What a heat map explains. token: of the answer, from 1. layers: block numbers, empty for the mean of all."""

    token: int
    layers: tuple[int, ...]


def chosen(token: str, layers: str) -> Chosen:
    """From the command line. Raises: ConfigError C102 for anything but first or a number, mean or a list."""
    if token != "first" and not (token.isdecimal() and int(token) >= 1):
        raise ConfigError("C102", f"token={token}: expected first or an integer from 1.")
    numbers = [] if layers == "mean" else layers.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise ConfigError("C102", f"layers={layers}: expected mean or layer numbers, for example 0,5,11.")
    return Chosen(1 if token == "first" else int(token), tuple(map(int, numbers)))


def token_grid(bundle: Bundle) -> Grid | None:
    """Rows and columns of the image tokens of one view; None where they do not lie on the image, as queries do not."""
    vision = cast(Encoder, bundle.model.vision)
    return output_grid(cast(Projector, bundle.model.projector), vision.grid, vision.num_tokens)


def box_of(mode: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """What of a photo, in its pixels, the first view of `ImageTransform` shows: left, top, right, bottom."""
    width, height = size
    if mode == "anyres":
        return 0, 0, width, height
    side = max(size) if mode == "pad" else min(size)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def photo_of(bundle: Bundle, shown: Shown) -> Image.Image:
    """The first image of a sample, not larger than a figure needs."""
    picture = ImageReader(bundle.image_transform).picture(shown.images[0])
    picture.thumbnail((SIDE, SIDE))
    return picture


def heats(bundle: Bundle, shown: Shown, wanted: Chosen, name: str) -> list[Heat]:
    """Maps for the first image of a sample: heads averaged, a map a layer or one of their mean; none without a grid.

    Raises: ConfigError C102 for a token or a layer that is not there.
    """
    grid = token_grid(bundle)
    if grid is None:
        return []
    blocks = len(bundle.parts.blocks)
    if any(layer >= blocks for layer in wanted.layers):
        raise ConfigError("C102", f"layers={max(wanted.layers)}: {name} has layers 0 to {blocks - 1}.")
    row = position(shown, wanted.token) - 1  # the query that predicts the token
    found = image_attention(bundle.model, bundle.parts, row, lambda: run(bundle, [shown]))  # (l, h, i)
    first = found[..., : math.prod(grid)].mean(1).unflatten(1, grid)  # (l, rows, columns)
    box = box_of(bundle.image_transform.mode, photo_of(bundle, shown).size)
    maps: Sequence[tuple[str, Tensor]] = [(f"{name}\nlayer {layer}", first[layer]) for layer in wanted.layers]
    return [Heat(title, x.numpy(), box) for title, x in maps or [(f"{name}\nmean of layers", first.mean(0))]]


def position(shown: Shown, token: int) -> int:
    """Where the answer's token stands. Raises: ConfigError C102 if the answer is shorter."""
    places = [place for run in answers(shown) for place in run]
    if token > len(places):
        message = f"token={token}: the answer of {shown.conversation.where} has {len(places)} tokens."
        raise ConfigError("C102", message, "choose a token it has, or another sample=N.")
    return places[token - 1]


def caption(bundle: Bundle, shown: Shown, token: int) -> str:
    """Question and answer in words, the token that is explained in brackets."""
    at, ids, decode = position(shown, token), shown.encoding.input_ids, bundle.tokenizer.decode
    turn, run = next((turn, run) for turn, run in enumerate(answers(shown)) if at in run)
    split = run.index(at)
    before, after = (
        decode([ids[p] for p in part], skip_special_tokens=True) for part in (run[:split], run[split + 1 :])
    )
    question = shown.conversation.exchanges[turn].question
    asked = " ".join("".join(c for c in question if isinstance(c, str)).split())
    this = decode([ids[at]])
    space = this[: len(this) - len(this.lstrip())]
    return " ".join(f"{asked} \u2192 {before}{space}[{this.strip()}]{after}".split())
