"""What a comparison holds: arms that differ in what they train, question sets, seeds, and how long it may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmpeft.errors import ConfigError, nearest
from vlmpeft.schema import build
from vlmpeft.tuners.base import check


@dataclass(frozen=True)
class Arm:
    """One way to tune.

    tuners: merged into those of the compared stage. lr: of these tuners; the best of several is found by a sweep, none
    leaves each tuner its own. train: false asks the model as the stages before left it. stage: other keys of the stage.
    """

    tuners: Mapping[str, Any] = field(default_factory=dict)
    lr: tuple[float, ...] = ()
    train: bool = True
    stage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuestionSet:
    """Yes/no questions about held-out images, with the recipe changes (data, align, ...) of the runs they judge.

    images: their folder; null is data.images. only: the arms asked, none for all. seeds: null is the comparison's.
    split: n shares of the images, of which models of seed s are asked about number s mod n: with as many as there are
    seeds, all seeds together are asked every question once. suffix: appended to each question. optional: left out
    where its file of questions is not there.
    """

    questions: str
    images: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    split: int = 1
    suffix: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        check(self.split >= 1, "split", self.split, "at least 1")


@dataclass(frozen=True)
class Sweep:
    """How an arm's learning rate is chosen: on the first `images` of the first set, which no final run is asked about.

    steps: null trains as long as the final runs. images: also those LMAR is read on.
    """

    seed: int = 0
    steps: int | None = None
    images: int = 50

    def __post_init__(self) -> None:
        check(self.images >= 1, "compare.sweep.images", self.images, "at least 1")
        check(self.steps is None or self.steps >= 1, "compare.sweep.steps", self.steps, "at least 1")


@dataclass(frozen=True)
class Comparison:
    """The section `compare` of a recipe. What is compared is the recipe's last stage; the others run once a seed.

    reference: the arm the others are held against. only: arms to run, none for all; the table shows all there are.
    hours: no run starts that would not be over by then. lmar: also read LMAR and the visual mass of every block.
    batch_size: images in a forward of the questions. start: where the stages before are kept, null is dir/start.
    results: where finished runs are kept, null is dir/results. Comparisons that share both make no run twice.
    """

    arms: Mapping[str, Arm]
    sets: Mapping[str, QuestionSet]
    reference: str
    dir: str = "runs/compare"
    start: str | None = None
    results: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: Sweep = field(default_factory=Sweep)
    only: tuple[str, ...] = ()
    hours: float | None = None
    lmar: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        check(bool(self.sets), "compare.sets", "{}", "at least one set of questions")
        check(bool(self.seeds), "compare.seeds", "[]", "at least one seed")
        check(len(set(self.seeds)) == len(self.seeds), "compare.seeds", list(self.seeds), "every seed once")
        check(self.hours is None or self.hours > 0, "compare.hours", self.hours, "a number above 0")
        check(self.batch_size >= 1, "compare.batch_size", self.batch_size, "at least 1")
        named = [("compare.reference", self.reference), *(("compare.only", name) for name in self.only)]
        named += [(f"compare.sets.{k}.only", name) for k, found in self.sets.items() for name in found.only]
        for where, name in named:
            if name not in self.arms:
                raise ConfigError("C101", f"{where}: no arm '{name}'{nearest(name, self.arms)}")

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds a set is run with: its own among the comparison's."""
        own = self.sets[name].seeds
        return self.seeds if own is None else tuple(seed for seed in self.seeds if seed in own)

    def arms_of(self, name: str) -> list[str]:
        """The arms a set is asked of, in order."""
        return [arm for arm in self.arms if not self.sets[name].only or arm in self.sets[name].only]


def read_comparison(section: Mapping[str, Any]) -> Comparison:
    """The section `compare`, checked; an arm or set that is null is left out. Raises: ConfigError C101, C102, C106."""
    kinds: dict[str, type] = {"arms": Arm, "sets": QuestionSet}
    found = dict(section)
    for key, kind in kinds.items():
        given = section.get(key) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(
                "C102", f"compare.{key}={given!r} is not a section.", f"write compare.{key}.NAME.key=value."
            )
        items = {str(name): values for name, values in given.items() if values is not None}
        found[key] = {name: build(kind, values, f"compare.{key}.{name}") for name, values in items.items()}
    return build(Comparison, found, "compare")
