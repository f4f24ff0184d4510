"""What a run left behind, read for its report: a missing or broken file is a reason, never an error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmpeft.charts import Point, drawable

Row = dict[str, Any]


@dataclass
class Run:
    """What a run left in its directory; `why` says of each input that is missing or unreadable, why."""

    directory: Path
    recipe: str = ""
    metrics: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    evaluation: Row = field(default_factory=dict)
    retention: Row = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)

    def stages(self) -> dict[str, Row]:
        """Stage name -> its row of the summary (empty if it has none), in the order trained."""
        known = {str(s.get("name", i)): s for i, s in enumerate(dicts(self.summary.get("stages")))}
        for row in self.metrics:
            known.setdefault(str(row.get("stage", "training")), {})
        return known

    def curve(self, stage: str, key: str, group: str | None = None) -> list[Point]:
        """The finite (step, value) points of one stage; `group` picks from a value that is an object."""
        points = []
        for row in self.metrics:
            value = row.get(key)
            value = value.get(group) if isinstance(value, dict) else value if group is None else None
            x, y = num(row.get("step")), num(value)
            if str(row.get("stage", "training")) == stage and x is not None and y is not None:
                points.append((x, y))
        return drawable(points)


def dicts(value: Any) -> list[Row]:
    """The objects in a list, or the one object given, or nothing."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, dict)]


def num(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # false for NaN


def percent(value: Any) -> float | None:
    """A share in percent: fractions times 100; above 1 it is percent already."""
    share = num(value)
    return None if share is None else share if share > 1 else 100 * share


def figure(value: float | None, text: str = "{:.1f}") -> str:
    """A number as text, a dash for none."""
    return "\u2013" if value is None else text.format(value)


def duration(seconds: float) -> str:
    """1 h 12 min, 43 min 10 s, 8.2 s."""
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.1f} s"


def interval(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n answers, in percent. Source: Wilson (1927), score interval."""
    z2 = 1.959964**2
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    low, high = ((share + z2 / (2 * n) + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return 100 * low, 100 * high


def read_run(directory: Path) -> Run:
    """Read every input that is there; a line of a `.jsonl` file cut short by a kill is skipped."""
    run = Run(directory)
    run.recipe = _text(run, "recipe.yaml")
    run.metrics, run.samples = _rows(run, "metrics.jsonl"), _rows(run, "samples.jsonl")
    run.summary, run.evaluation = _object(run, "summary.json"), _object(run, "evaluation.json")
    run.retention = _object(run, "retention.json")
    return run


def _text(run: Run, name: str) -> str:
    try:
        return (run.directory / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        run.why[name] = f"there is no {name} in the run directory"
    except OSError as error:
        run.why[name] = f"{name} cannot be read ({error.strerror})"
    return ""


def _parse(text: str) -> Row:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _object(run: Run, name: str) -> Row:
    value = _parse(_text(run, name))
    if not value:
        run.why.setdefault(name, f"{name} holds no JSON object")
    return value


def _rows(run: Run, name: str) -> list[Row]:
    rows = [row for line in _text(run, name).split("\n") if (row := _parse(line))]
    if not rows:
        run.why.setdefault(name, f"{name} holds no rows")
    return rows
