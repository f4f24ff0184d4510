"""The runs of a comparison: which there are, what each trains and is asked, and under which name its result is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmpeft import fs
from vlmpeft.compare_config import Comparison
from vlmpeft.config import recipe_of, to_yaml
from vlmpeft.errors import ConfigError
from vlmpeft.recipe import DiagnoseConfig, EvalConfig, Recipe, RetentionConfig, RunConfig
from vlmpeft.sections import Plain

SAMPLE = 20  # how many questions a training sample costs, for the time that is left
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One run. lr: of the arm's own tuners, None for what they have. sweep: it only helps to choose that rate."""

    set: str
    arm: str
    seed: int
    lr: float | None
    sweep: bool

    @property
    def name(self) -> str:
        """As people read it."""
        rate = "" if self.lr is None else f", lr {self.lr:g}"
        return f"{'sweep ' if self.sweep else ''}{self.set}: {self.arm}{rate}, seed {self.seed}"

    @property
    def file(self) -> str:
        """As files are called."""
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{self.set}-{self.arm}-seed{self.seed}{rate}{'-sweep' if self.sweep else ''}"


class Plan:
    """What the runs of a comparison do.

    Args:
        shared: values of the recipe all runs share.
        questions: rows of every set.
    """

    def __init__(self, comparison: Comparison, shared: Plain, questions: Mapping[str, Sequence[Row]]) -> None:
        self.comparison, self.shared, self.rows = comparison, shared, questions
        self.first = next(iter(comparison.sets))
        self._contents: dict[str, str] = {}
        self._made: dict[Task, Recipe] = {}
        self._digests: dict[Task, str] = {}
        for name in comparison.sets:
            if not self.asked(Task(name, "", self.comparison.seeds[0], None, False)):
                few = f"compare.sets.{name}: no image is left beside the {comparison.sweep.images} of the sweep."
                raise ConfigError("C102", few, "lower compare.sweep.images, or give more questions.")

    def recipe(self, task: Task) -> Recipe:
        """What a run trains: the last stage of its arm's recipe, from where the stages before it end."""
        whole = self._whole(task)
        last = list(whole.stages)[-1]
        return _quiet(dataclasses.replace(whole, stages={last: whole.stages[last]}, init=None), task.seed)

    def start(self, task: Task) -> Recipe | None:
        """What comes before the compared stage, once for all arms; None if nothing does."""
        whole = self._whole(_shared(task))
        *before, _ = whole.stages
        if not before:
            return None
        quiet = _quiet(dataclasses.replace(whole, stages={name: whole.stages[name] for name in before}), task.seed)
        folder = Path(self.comparison.start or f"{self.comparison.dir}/start")
        directory = folder / f"{task.set}-seed{task.seed}-{self._digest(quiet)}"
        title = f"start of {task.set}, seed {task.seed}"
        return dataclasses.replace(quiet, title=title, run=dataclasses.replace(quiet.run, dir=str(directory)))

    def init(self, task: Task) -> str | None:
        """What a comparison without earlier stages starts from, if anything; see `Recipe`."""
        return self._whole(_shared(task)).init

    def _whole(self, task: Task) -> Recipe:
        """All stages of a run's recipe; without an arm, the recipe that all arms share."""
        if task not in self._made:
            self._made[task] = self._merged(task)
        return self._made[task]

    def _merged(self, task: Task) -> Recipe:
        chosen = self.comparison.sets[task.set].recipe
        if not task.arm:
            return recipe_of(self.shared, chosen)
        arm = self.comparison.arms[task.arm]
        rate = {} if task.lr is None else {"lr": task.lr}
        tuners = {name: None if own is None else {**own, **rate} for name, own in arm.tuners.items()}
        change = {**arm.stage, "tuners": tuners}
        steps = self.comparison.sweep.steps if task.sweep else None
        if steps is not None:
            change["optim"] = {**change.get("optim", {}), "steps": steps}
        stages = self.shared.get("stages")
        return recipe_of(self.shared, chosen, {"stages": {list(stages)[-1]: change}} if stages else change)

    def asked(self, task: Task) -> list[Row]:
        """The questions a run's model is asked: held-out ones for a final run, the sweep's for a sweep."""
        chosen, rows = self.comparison.sets[task.set], self.rows[task.set]
        if task.sweep:
            return self.probed(task.set)
        reserved = self.sweeps and chosen.questions == self.comparison.sets[self.first].questions
        first = {row["image"] for row in self.probed(task.set)} if reserved else set()
        images = list(dict.fromkeys(row["image"] for row in rows if row["image"] not in first))
        own = set(images[task.seed % chosen.split :: chosen.split])
        return [row for row in rows if row["image"] in own]

    def probed(self, name: str) -> list[Row]:
        """The questions about a set's first images: those of the sweep and of LMAR."""
        rows = self.rows[name]
        images = set(list(dict.fromkeys(row["image"] for row in rows))[: self.comparison.sweep.images])
        return [row for row in rows if row["image"] in images]

    @property
    def sweeps(self) -> bool:
        """Whether any arm has its learning rate chosen."""
        return any(len(arm.lr) > 1 for arm in self.comparison.arms.values())

    def candidates(self, arm: str) -> list[Task]:
        """The sweep of an arm; empty where there is nothing to choose."""
        rates = self.comparison.arms[arm].lr
        sweep = self.comparison.sweep
        return [Task(self.first, arm, sweep.seed, lr, True) for lr in rates] if len(rates) > 1 else []

    def finals(self) -> Iterator[tuple[str, str, int]]:
        """(set, arm, seed) of every final run: one seed of everything before the next."""
        for seed in self.comparison.seeds:
            for name in self.comparison.sets:
                for arm in self.comparison.arms_of(name):
                    if seed in self.comparison.seeds_of(name):
                        yield name, arm, seed

    def cost(self, task: Task) -> int:
        """How long a run takes, in questions."""
        return (self.steps(task) * self._batch(task) * SAMPLE) + len(self.asked(task))

    def steps(self, task: Task) -> int:
        """Optimizer steps as far as the recipe says; 0 for an arm that does not train."""
        if not self.comparison.arms[task.arm].train:
            return 0
        stage = next(iter(self.recipe(task).stages.values()))
        return stage.optim.steps or 100  # a guess for epochs, whose length the data decides

    def _batch(self, task: Task) -> int:
        return next(iter(self.recipe(task).stages.values())).batch.size

    def digest(self, task: Task) -> str:
        """Of all that decides a result: a run is made again when one of these changes, and only then."""
        if task not in self._digests:
            chosen, start = self.comparison.sets[task.set], self.start(task)
            probed = self.probed(task.set) if self.comparison.lmar and not task.sweep else None
            asked = json.dumps([self.asked(task), probed])
            begun = self.init(task) if start is None else Path(start.run.dir).name
            about = (self.comparison.arms[task.arm].train, chosen.suffix, asked, begun)
            self._digests[task] = self._digest(self.recipe(task), about)
        return self._digests[task]

    def _digest(self, recipe: Recipe, about: object = None) -> str:
        """Of what a recipe trains, on which data."""
        files = sorted({file.path for stage in recipe.stages.values() for file in recipe.data.files(stage.source)})
        parts = (to_yaml(recipe), [self._content(file) for file in files], about)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]

    def _content(self, path: str) -> str:
        if path not in self._contents:
            self._contents[path] = fs.sha256(Path(path)) if Path(path).is_file() else path
        return self._contents[path]


def _shared(task: Task) -> Task:
    """What the arms of a set have in common."""
    return Task(task.set, "", 0, None, False)


def _quiet(recipe: Recipe, seed: int) -> Recipe:
    """A recipe without what is asked, watched and kept beside the training itself."""
    run = RunConfig(seed=seed, device=recipe.run.device, precision=recipe.run.precision)
    bare = {"eval": EvalConfig(), "retention": RetentionConfig(), "diagnose": DiagnoseConfig(), "title": ""}
    return dataclasses.replace(recipe, run=run, **bare)  # type: ignore[arg-type]
