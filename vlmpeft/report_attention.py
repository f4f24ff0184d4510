"""How attention to the image changed in a stage, for the report: LMAR and visual mass per layer, a line a reading."""

from __future__ import annotations

from typing import Any

from vlmpeft.charts import Point, Series, line_chart
from vlmpeft.report_data import Row, Run, num

READINGS = 5  # most lines drawn, the first and the last among them


def attention(run: Run, stage: str) -> str:
    """Two charts of what `diagnose` logged in a stage; "" without it."""
    rows = [r for r in run.metrics if str(r.get("stage")) == stage and isinstance(r.get("visual_mass"), list)]
    chosen = [rows[i * (len(rows) - 1) // max(1, READINGS - 1)] for i in range(READINGS)] if rows else []
    shown = list({str(row.get("step")): row for row in chosen}.values())
    ratios = [Series(f"step {r.get('step')}", _points(r.get("lmar")), color=i) for i, r in enumerate(shown)]
    masses = [Series(f"step {r.get('step')}", _percent(r), color=i) for i, r in enumerate(shown)]
    charts = ""
    if any(s.points for s in ratios):
        ends = [x for s in ratios for x, _ in s.points]
        even = Series("image = text", [(min(ends), 1.0), (max(ends), 1.0)], color=len(ratios))
        label = "per token, image / text, log scale"
        charts += _figure(line_chart("LMAR", [*ratios, even], "layer", label, width=560, height=280, log=True))
    if masses:
        label = "attention on the image, %"
        charts += _figure(line_chart("Visual attention", masses, "layer", label, width=560, height=280, zero=True))
    return f'<div class="small">{charts}</div>' if charts else ""


def _figure(chart: str) -> str:
    return f"<figure>{chart}</figure>"


def _points(values: Any) -> list[Point]:
    """(layer, value) of a list; layers without a value are left out."""
    listed = values if isinstance(values, list) else []
    return [(float(i), v) for i, value in enumerate(listed) if (v := num(value)) is not None]


def _percent(row: Row) -> list[Point]:
    return [(x, 100 * y) for x, y in _points(row["visual_mass"])]
