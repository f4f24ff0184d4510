"""The figures of a comparison, an arm a row, and the tables people read: Markdown, text and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmpeft.charts import number
from vlmpeft.compare_stats import Answered, is_right, mean_accuracy, mean_of, paired, spread

Result = Mapping[str, Any]
COLUMNS = (
    "arm", "LLM", "projector", "lr", "accuracy", "spread", "difference", "seeds", "s/step", "memory", "adapter",
)  # fmt: skip
LEGEND = (
    "LLM and projector: parameters trained. accuracy: of Yes or No by likelihood, %. spread: standard deviation over "
    "seeds. difference: to {reference}, with its 95 % bootstrap interval by image, in points. memory: peak of training "
    "above the loaded model. adapter: bytes saved beside the projector."
)


@dataclass(frozen=True)
class Line:
    """What one arm came to on one set. Sizes in bytes; None where nothing was measured or compared.

    spread: standard deviation of accuracy over seeds. paired: see `compare_stats.paired`. lmar, visual_mass: (l,) means
    over seeds.
    """

    arm: str
    language: int
    projector: int
    lr: float | None
    accuracy: float
    spread: float | None
    paired: Mapping[str, Any] | None
    seeds: tuple[int, ...]
    questions: int
    seconds_per_step: float | None
    peak_bytes: float | None
    adapter_bytes: int
    lmar: tuple[float | None, ...] | None = None
    visual_mass: tuple[float | None, ...] | None = None

    @property
    def mean_lmar(self) -> float | None:
        """Geometric mean over the blocks: ratios of 1/2 and 2 are equally far from 1."""
        known = [value for value in self.lmar or () if value]
        return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def lines_of(
    results: Mapping[str, Sequence[Result]], reference: str, rows: Mapping[str, Mapping[str, Any]]
) -> list[Line]:
    """A line for each arm that has a result.

    Args: results: final runs by arm. reference: the arm the others are held against. rows: questions by id.
    """
    answered = {arm: [_answered(run, rows) for run in runs] for arm, runs in results.items() if runs}
    lines = []
    for arm, runs in answered.items():
        found = results[arm]
        beside = answered.get(reference, []) if arm != reference else []
        lines.append(
            Line(
                arm, int(found[0]["trainable_language"]), int(found[0]["trainable_projector"]), found[0]["lr"],
                mean_accuracy(runs), spread(runs), paired(runs, beside), tuple(run.seed for run in runs),
                sum(len(run.right) for run in runs), mean_of(found, "seconds_per_step"), mean_of(found, "peak_bytes"),
                int(found[0]["adapter_bytes"]), _layers(found, "lmar"), _layers(found, "visual_mass"),
            )
        )  # fmt: skip
    return lines


def _answered(run: Result, rows: Mapping[str, Mapping[str, Any]]) -> Answered:
    asked = [rows[question] for question in run["questions"]]
    right = [is_right(margin, str(row["label"])) for margin, row in zip(run["margins"], asked, strict=True)]
    return Answered(int(run["seed"]), run["questions"], [str(row["image"]) for row in asked], right)


def _layers(runs: Sequence[Result], key: str) -> tuple[float | None, ...] | None:
    """(l,) mean over the runs that have it, None in a layer where none has a value."""
    found = [run[key] for run in runs if run.get(key)]
    columns = [[v for v in column if v is not None] for column in zip(*found, strict=True)]
    return tuple(sum(c) / len(c) if c else None for c in columns) if found else None


def cells(line: Line, lmar: bool) -> list[str]:
    """A line as text, in the order of `header`."""
    found = line.paired
    between = f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}" if found else ""
    return [
        line.arm, f"{line.language:,}", f"{line.projector:,}", "" if line.lr is None else f"{line.lr:g}",
        f"{100 * line.accuracy:.1f}", "" if line.spread is None else f"{100 * line.spread:.1f}",
        f"{100 * found['difference']:+.1f} ({between})" if found else "", str(len(line.seeds)),
        "" if line.seconds_per_step is None else f"{line.seconds_per_step:.2f}", size(line.peak_bytes),
        size(line.adapter_bytes),
        *(["" if line.mean_lmar is None else f"{line.mean_lmar:.3f}"] if lmar else []),
    ]  # fmt: skip


def header(lmar: bool) -> list[str]:
    """Names of the columns."""
    return [*COLUMNS, *(["LMAR"] if lmar else [])]


def grid(lines: Sequence[Line]) -> list[list[str]]:
    """Header and lines as text, with a column for LMAR if any line has it."""
    lmar = any(line.lmar for line in lines)
    return [header(lmar), *(cells(line, lmar) for line in lines)]


def markdown(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table, figures to the right."""
    first, *rest = grid(lines)
    rule = ["---", *("---:" for _ in first[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (first, rule, *rest))


def size(value: float | None) -> str:
    """Bytes as people read them: 0, 12.5 KiB, 3.1 MiB."""
    if value is None:
        return ""
    for unit, floor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= floor:
            return f"{value / floor:.1f} {unit}"
    return number(value)
