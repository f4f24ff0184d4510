"""A figure of an evaluation by which the best state of a stage is known: `run.best_by=eval.pope.accuracy`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmpeft.build import Bundle
from vlmpeft.decode import Answer, Request
from vlmpeft.errors import ConfigError, nearest
from vlmpeft.eval import pope, short
from vlmpeft.evaluation import Benchmark
from vlmpeft.recipe import EvalConfig, Stage

BY_LOSS = "loss"
NOT_BETTER = ("yes_ratio",)  # neither more nor less of it is better


def figures(metrics: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    """Name and value of every score in (nested) metrics; counts and intervals are none."""
    for key, value in metrics.items():
        if isinstance(value, float) and key not in NOT_BETTER:
            yield f"{path}.{key}", value
        elif isinstance(value, Mapping):
            yield from figures(value, f"{path}.{key}")


def find_benchmark(name: str, benchmarks: Sequence[Benchmark]) -> Benchmark | None:
    """The benchmark that has the figure `name`; None for the held-out loss.

    Raises: ConfigError C102 naming the figures there are, C106 if no questions are asked.
    """
    if name == BY_LOSS:
        return None
    if not benchmarks:
        raise ConfigError("C106", f"run.best_by={name}, but no eval.questions.", "set eval.questions=FILE.")
    known: dict[str, Benchmark] = {}
    for benchmark in benchmarks:
        module = short if benchmark.by_type else pope
        said = [{**_key(question), "text": "", "margin": 0.0} for question in benchmark.questions]
        silent = module.score(benchmark.questions, said)
        known |= {figure: benchmark for figure, _ in figures(silent, f"eval.{benchmark.name}")}
    if name not in known:
        raise ConfigError("C102", f"run.best_by={name}: no such figure{nearest(name, [BY_LOSS, *known])}")
    return known[name]


def _key(question: Mapping[str, Any]) -> dict[str, Any]:
    return {key: question[key] for key in ("setting", "question_id") if key in question}


class Stopped(Exception):
    """Somebody said stop while a model was asked."""


@dataclass(frozen=True)
class Watched:
    """A model that is asked batch by batch until `stopping` says so."""

    bundle: Bundle
    stopping: Callable[[], bool]

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 16,
        batch_size: int = 16,
        contrast: tuple[str, str] | None = None,
        on_batch: Callable[[Sequence[tuple[int, Answer]]], None] | None = None,
    ) -> list[Answer]:
        """As the model's. Raises: Stopped between two batches."""

        def watch(pairs: Sequence[tuple[int, Answer]]) -> None:
            if self.stopping():
                raise Stopped
            if on_batch:
                on_batch(pairs)

        return self.bundle.answer(
            requests, max_new_tokens=max_new_tokens, batch_size=batch_size, contrast=contrast, on_batch=watch
        )

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        """As the model's."""
        return self.bundle.blank_image(image)


@dataclass(frozen=True)
class EvalFigure:
    """One figure of one benchmark, found by asking the model with the template of `stage`."""

    name: str
    benchmark: Benchmark
    bundle: Bundle
    config: EvalConfig
    stage: Stage

    def __call__(self, stopping: Callable[[], bool]) -> float | None:
        """Returns: the figure; None if `stopping` said so in between."""
        before, self.bundle.stage = self.bundle.stage, self.stage
        try:
            _, metrics = self.benchmark.ask(Watched(self.bundle, stopping), self.config)
        except Stopped:
            return None
        finally:
            self.bundle.stage = before
        return dict(figures(metrics, f"eval.{self.benchmark.name}"))[self.name]
