"""Draws a small data set of coloured shapes: images, captions, questions, and tests that text alone cannot pass.

`python -m vlmpeft.scenes out=DIR` writes `pretrain.json`, `instruct.json` and `existence.json` (LLaVA; the last holds
yes/no questions alone), `pope_test.jsonl` (POPE) and `types_test.jsonl` (every kind of question). Equal arguments give
equal bytes; no test scene is one of the others.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from vlmpeft.errors import CheckpointError, ConfigError, nearest, run_command
from vlmpeft.fs import writing
from vlmpeft.scene_files import captions, existence_turns, pope, types
from vlmpeft.scene_questions import CELLS, COLORS, NUMBERS, SHAPES, Scene, Thing, instruct

WIDTHS = {"large": (0.36, 0.40), "small": (0.21, 0.24)}  # diameters, fractions of the side: 81-90 and 47-54 of 224
JITTER = 0.8  # how much of the room left in its cell an object may move
TURN = 12.0  # degrees an object may be turned either way
CENTERED = 0.33  # share of lone objects drawn in the centre
TEST_SHARE = 6  # one description in this many belongs to the test, whatever the seed
RGB = {
    "red": (214, 40, 40),
    "green": (30, 140, 60),
    "blue": (35, 80, 215),
    "yellow": (250, 210, 40),
    "black": (24, 24, 28),
    "white": (250, 250, 250),
}
GROUNDS = (  # muted tones, light enough for black and dark enough for white
    *((178, 166, 148), (150, 164, 172), (168, 152, 162), (152, 166, 150), (172, 160, 170), (160, 160, 160)),
    *((144, 152, 166), (176, 158, 150)),
)
PATTERNS = ("flat", "gradient", "stripes", "dots", "checks")
CENTERS = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
POLYGONS = {"circle": (90, (0.5,)), "square": (4, (0.6,)), "triangle": (3, (0.6,)), "star": (10, (0.6, 0.27))}
REACH = 0.6  # farthest an outline gets from its centre, in diameters
SUPERSAMPLING = 2
DEFAULTS = {"seed": 0, "train": 700, "test": 100, "pretrain": 700, "size": 224}
LIMITS = {"seed": (0, 2**31), "size": (32, 2048)}  # other numbers: 0 to 9999
HELP = "usage: python -m vlmpeft.scenes out=DIR " + " ".join(f"[{k}={v}]" for k, v in DEFAULTS.items()) + "\n"


def sample(split: str, seed: int, n: int) -> list[Scene]:
    """`n` scenes of "train", "pretrain" or "test", counts of objects even; test descriptions occur nowhere else."""
    scenes = []
    for i in range(n):
        rng = random.Random(f"{seed}/{split}/{i}")
        scene = _scene(rng, 1 + i % len(NUMBERS))
        while (zlib.crc32(scene.description.encode()) % TEST_SHARE == 0) != (split == "test"):
            scene = _scene(rng, 1 + i % len(NUMBERS))
        scenes.append(scene)
    return scenes


def _scene(rng: random.Random, count: int) -> Scene:
    looks = rng.sample([(s, c) for s in SHAPES for c in COLORS], count)
    cells = sorted(rng.sample(CELLS[:4], count), key=CELLS.index)
    if count == 1 and rng.random() < CENTERED:
        cells = ["center"]
    things = []
    for (shape, color), cell in zip(looks, cells, strict=True):
        size = rng.choice(tuple(WIDTHS))
        width = rng.uniform(*WIDTHS[size])
        x, y = CENTERS.get(cell, (0.5, 0.5))
        room = JITTER * (0.25 - REACH * width) if cell in CENTERS else 0.05
        x, y = x + rng.uniform(-room, room), y + rng.uniform(-room, room)
        things.append(Thing(shape, color, size, cell, x, y, width, rng.uniform(-TURN, TURN)))
    first, second = rng.sample(GROUNDS, 2)
    return Scene(tuple(things), rng.choice(PATTERNS), (first, second), rng.uniform(0, 180))


def draw(scene: Scene, size: int = 224) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels."""
    side = size * SUPERSAMPLING
    image = _background(scene, side)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        pen.polygon([(side * x, side * y) for x, y in outline(thing)], fill=RGB[thing.color])
    return image.reduce(SUPERSAMPLING)


def _background(scene: Scene, side: int) -> Image.Image:
    first, second = scene.tones
    image = Image.new("RGB", (side, side), first)
    if scene.pattern == "flat":
        return image
    big = int(side * 1.5)  # so that no corner is left bare after turning
    mask = Image.new("L", (big, big))
    pen, step = ImageDraw.Draw(mask), side / 12
    lines = range(math.ceil(big / step))
    if scene.pattern == "gradient":
        mask = Image.linear_gradient("L").resize((big, big), Image.Resampling.BILINEAR)
    elif scene.pattern == "stripes":
        for i in lines[::2]:
            pen.rectangle((0, i * step, big, (i + 1) * step), fill=170)
    for i, j in itertools.product(lines, lines):
        if scene.pattern == "checks" and (i + j) % 2:
            pen.rectangle((i * step, j * step, (i + 1) * step, (j + 1) * step), fill=110)
        elif scene.pattern == "dots" and (i + j) % 2:
            pen.ellipse(((i + 0.2) * step, (j + 0.2) * step, (i + 0.8) * step, (j + 0.8) * step), fill=200)
    edge = (big - side) // 2
    mask = mask.rotate(scene.angle).crop((edge, edge, edge + side, edge + side))
    image.paste(second, mask=mask)
    return image


def outline(thing: Thing) -> list[tuple[float, float]]:
    """The corners of an object, as fractions of the image side."""
    corners, radii = POLYGONS.get(thing.shape, (90, ()))
    angles = [(i + 0.5 * (thing.shape == "square")) * 2 * math.pi / corners for i in range(corners)]
    if radii:
        unit = [(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, itertools.cycle(radii), strict=False)]
    else:  # the usual heart: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t
        waves = [(-13, 1), (5, 2), (2, 3), (1, 4)]
        unit = [(math.sin(a) ** 3 / 2, sum(f * math.cos(n * a) for f, n in waves) / 32) for a in angles]
    c, s = math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn))
    return [(thing.x + thing.width * (c * x - s * y), thing.y + thing.width * (s * x + c * y)) for x, y in unit]


def write(
    out: Path,
    *,
    seed: int = 0,
    pretrain: int = 700,
    train: int = 700,
    test: int = 100,
    size: int = 224,
    progress: bool = True,
) -> None:
    """Write the data set into `out`: the images first, then the files that name them.

    `pretrain`, `train`, `test` are numbers of images, `size` their side in pixels.
    Raises: CheckpointError K130: `out` cannot be written.
    """
    splits = {s: sample(s, seed, n) for s, n in (("pretrain", pretrain), ("train", train), ("test", test))}
    rng = random.Random(f"{seed}/questions")
    files = {
        "pretrain.json": json.dumps(captions(splits["pretrain"]), indent=1) + "\n",
        "instruct.json": json.dumps(instruct(splits["train"], rng), indent=1) + "\n",
        "existence.json": json.dumps(existence_turns(splits["train"], random.Random(f"{seed}/existence")), indent=1)
        + "\n",
        "pope_test.jsonl": "".join(json.dumps(row) + "\n" for row in pope(splits["test"], rng)),
        "types_test.jsonl": "".join(json.dumps(row) + "\n" for row in types(splits["test"], rng)),
    }
    numbered = [(f"{split}_{i:04d}.png", scene) for split, scenes in splits.items() for i, scene in enumerate(scenes)]
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        for name, scene in tqdm(numbered, desc="drawing", unit="image", disable=not progress):
            draw(scene, size).save(out / "images" / name)
        for name, text in files.items():
            with writing(out / name) as file:
                file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            "K130", f"cannot write {out}: {error}.", "give out= a folder you may write to."
        ) from error


def main(argv: Sequence[str]) -> int:
    """`out=DIR [seed=0] [train=N] [test=N] [pretrain=N] [size=224]`."""
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(HELP)
        return 0
    out, values = "", dict(DEFAULTS)
    for argument in argv:
        key, equals, value = argument.partition("=")
        low, high = LIMITS.get(key, (0, 9999))
        if not equals:
            raise ConfigError("C130", f"expected key=value, got '{argument}'.", "write for example out=scenes.")
        if key == "out":
            out = value
        elif key not in DEFAULTS:
            raise ConfigError("C131", f"no key '{key}'{nearest(key, ['out', *DEFAULTS])}")
        elif not (value.isascii() and value.isdecimal() and low <= int(value) <= high):
            raise ConfigError(
                "C132", f"{argument}: not a whole number from {low} to {high}.", f"try {key}={DEFAULTS[key]}."
            )
        else:
            values[key] = int(value)
    if not out:
        raise ConfigError("C133", "out is not given.", "say where to write, for example out=scenes.")
    write(Path(out), progress=True, **values)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
