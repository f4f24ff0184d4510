"""All runs of a comparison in one go: what is done is read, what is missing is made, what fails is written down."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmpeft import fs
from vlmpeft.compare_plan import Plan, Task
from vlmpeft.compare_stats import confidence
from vlmpeft.errors import VlmpeftError, printable

RESULTS = "results"
Result = dict[str, Any]
Work = Callable[[Task], Result]
BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed} spent, {remaining} left{postfix}"


class Results:
    """Finished runs, a file each; a file is whole or absent, and named after all that decides what is in it."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan, self.directory = plan, Path(plan.comparison.results or directory / RESULTS)
        self.errors: dict[str, Exception] = {}
        if plan.comparison.results is None:  # or another comparison may be writing there
            fs.sweep(self.directory)

    def path(self, task: Task) -> Path:
        """Where the result of a run is kept."""
        return self.directory / f"{task.file}-{self.plan.digest(task)}.json"

    def get(self, task: Task) -> Result | None:
        """The result of a run, if it has come to its end."""
        path = self.path(task)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def put(self, task: Task, result: Mapping[str, Any]) -> None:
        """Keep a result."""
        fs.write_json(self.path(task), result)

    def final(self, task: Task) -> Task | None:
        """A final run with its arm's learning rate, as soon as that is known.

        It is the one whose sweep gives the right answers most probability; rates that failed are passed over.
        Raises: the error of the last one if all of them failed.
        """
        tasks = self.plan.candidates(task.arm)
        if not tasks:
            given = self.plan.comparison.arms[task.arm].lr
            return replace(task, lr=given[0] if given else None)
        found = [(one, self.get(one)) for one in tasks]
        if any(result is None and one.file not in self.errors for one, result in found):
            return None
        scores = {one.lr: self._score(one, result) for one, result in found if result is not None}
        if not scores:
            raise self.errors[tasks[-1].file]
        return replace(task, lr=max(scores, key=lambda lr: scores[lr]))

    def failed_sweeps(self) -> set[str]:
        """Arms of which every rate of the sweep failed."""
        arms = self.plan.comparison.arms
        tasks = {arm: self.plan.candidates(arm) for arm in arms}
        return {arm for arm in arms if tasks[arm] and all(task.file in self.errors for task in tasks[arm])}

    def _score(self, task: Task, result: Result) -> float:
        return confidence(result["margins"], [str(row["label"]) for row in self.plan.asked(task)])


class Clock:
    """How long the runs that are left will take. Args: hours: after which none is started any more."""

    def __init__(self, hours: float | None) -> None:
        self.limit = None if hours is None else 3600 * hours
        self.began, self.spent, self.cost = time.monotonic(), 0.0, 0

    def allows(self, cost: int) -> bool:
        """Whether a run would be over in time."""
        expected = self.spent / self.cost * cost if self.cost else 0.0
        return self.limit is None or time.monotonic() - self.began + expected <= self.limit

    @contextlib.contextmanager
    def measuring(self, cost: int) -> Iterator[None]:
        """Learn from the run inside the `with` block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent, self.cost = self.spent + time.monotonic() - began, self.cost + cost


def run_all(plan: Plan, results: Results, work: Work, say: Callable[[str], None]) -> int:
    """Make every run that is chosen and has no result yet. Returns: how many are left because time is up.

    A run that fails is noted in `results.errors` and made again by the next command; the others go on.
    """
    todo = list(schedule(plan))
    costs = [plan.cost(task) for task in todo]
    clock, left = Clock(plan.comparison.hours), 0
    with tqdm(total=sum(costs), desc="runs", bar_format=BAR) as bar:
        for asked, cost in zip(todo, costs, strict=True):
            task: Task | None = asked
            try:
                if not asked.sweep:
                    task = results.final(asked)
                if task is not None and results.get(task) is not None:
                    left_out(bar, cost)
                elif task is None or not clock.allows(cost):
                    left += 1
                else:
                    bar.set_postfix_str(f"  {task.name}")
                    with clock.measuring(cost):
                        results.put(task, work(task))
                    bar.update(cost)
            except Exception as error:
                results.errors[asked.file] = error
                left_out(bar, cost)
                say(f"{asked.name} failed: {line_of(error)}")
    return left


def left_out(bar: tqdm[Any], cost: int) -> None:
    """Take a run that will not be made off what is left."""
    bar.total = (bar.total or 0) - cost
    bar.refresh()


def schedule(plan: Plan) -> Iterator[Task]:
    """Every chosen run, an arm's sweep before its first final run; of these the learning rate is still open."""
    swept: set[str] = set()
    for name, arm, seed in plan.finals():
        if plan.comparison.only and arm not in plan.comparison.only:
            continue
        if arm not in swept:
            swept.add(arm)
            yield from plan.candidates(arm)
        yield Task(name, arm, seed, None, False)


def line_of(error: BaseException) -> str:
    """An error as one line."""
    return error.line() if isinstance(error, VlmpeftError) else printable(f"{type(error).__name__}: {error}")
