"""What a comparison leaves behind: table.md, table.json, accuracy.png, lmar.png and report.html."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from vlmpeft import fs
from vlmpeft.compare_loop import Results, line_of
from vlmpeft.compare_picture import accuracy_figure
from vlmpeft.compare_plan import Task
from vlmpeft.compare_table import LEGEND, Line, grid, lines_of, markdown
from vlmpeft.report_style import STYLE
from vlmpeft.steering import pictures

TOGETHER = 6  # lines in one figure of LMAR, as many as there are colours


def lines_by_set(results: Results) -> dict[str, list[Line]]:
    """The lines of every set with a result, arms in the order of the comparison."""
    comparison = results.plan.comparison
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in comparison.sets}
    for name, arm, seed in results.plan.finals():
        if arm not in results.failed_sweeps():
            task = results.final(Task(name, arm, seed, None, False))
            result = results.get(task) if task else None
            if result is not None:
                found[name].setdefault(arm, []).append(result)
    lines = {}
    for name, by_arm in found.items():
        ordered = {arm: by_arm[arm] for arm in comparison.arms if arm in by_arm}
        rows = {str(row["question_id"]): row for row in results.plan.rows[name]}
        lines[name] = lines_of(ordered, comparison.reference, rows)
    return {name: found_lines for name, found_lines in lines.items() if found_lines}


def write_all(results: Results, directory: Path, title: str) -> dict[str, list[Line]]:
    """Write every table and figure anew. Returns: the lines of every set."""
    sets = lines_by_set(results)
    errors = {name: line_of(error) for name, error in results.errors.items()}
    plain = {name: [{**asdict(line), "mean_lmar": line.mean_lmar} for line in lines] for name, lines in sets.items()}
    about = {"title": title, "reference": results.plan.comparison.reference}
    fs.write_json(directory / "table.json", {**about, "sets": plain, "failed": errors})
    legend = LEGEND.format(reference=results.plan.comparison.reference)
    blocks = [f"## {name}: {_asked(lines)}\n\n{markdown(lines)}" for name, lines in sets.items()]
    failed = [f"- {name}: {line}" for name, line in errors.items()]
    text = [f"# {title}", *blocks, legend, *(["Failed:\n\n" + "\n".join(failed)] if failed else [])]
    fs.write_text(directory / "table.md", "\n\n".join(text) + "\n")
    figures = {name: _figures(name, lines, directory) for name, lines in sets.items()}
    fs.write_text(directory / "report.html", _page(title, sets, figures, legend, errors))
    return sets


def _asked(lines: Sequence[Line]) -> str:
    most = max(line.questions for line in lines)
    return f"{most:,} answers an arm" + ("" if all(line.questions == most for line in lines) else " at most")


def _figures(name: str, lines: Sequence[Line], directory: Path) -> dict[Path, str]:
    """Draw a set. Returns: the files, and what each shows in words."""
    drawn = {"accuracy": accuracy_figure(lines, name)}
    words = {"accuracy": f"Accuracy of each arm on {name}, against the parameters it trains in the language model"}
    known = [line for line in lines if line.lmar and line.visual_mass]
    for start in range(0, len(known), TOGETHER):
        chosen = [_overlaid(line) for line in known[start : start + TOGETHER]]
        kind, arms = f"lmar-{start // TOGETHER + 1}", ", ".join(line.name for line in chosen)
        drawn[kind] = pictures.layers_figure(chosen, "LMAR, mean over seeds")
        words[kind] = f"LMAR and visual attention in each layer on {name}: {arms}"
    files = {directory / f"{name}-{kind}.png": text for kind, text in words.items()}
    for target, png in zip(files, drawn.values(), strict=True):
        with fs.writing(target) as path:
            path.write_bytes(png)
    return files


def _overlaid(line: Line) -> pictures.Line:
    nan = float("nan")
    ratio, mass = ([nan if v is None else v for v in values or ()] for values in (line.lmar, line.visual_mass))
    return pictures.Line(line.arm, ratio, ratio, ratio, mass)


def _page(
    title: str,
    sets: Mapping[str, Sequence[Line]],
    figures: Mapping[str, Mapping[Path, str]],
    legend: str,
    errors: Mapping[str, str],
) -> str:
    """One HTML file with everything in it."""
    parts = []
    for name, lines in sets.items():
        first, *rest = grid(lines)
        head = "".join(f"<th>{escape(cell)}</th>" for cell in first)
        body = "".join(
            f"<tr><th>{escape(row[0])}</th>"
            + "".join(f"<td>{escape(cell) or '&ndash;'}</td>" for cell in row[1:])
            + "</tr>"
            for row in rest
        )
        table = f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        shown = "".join(
            f'<figure class="card scroll drawn"><img alt="{escape(words)}" src="data:image/png;base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
            for path, words in figures[name].items()
        )
        parts.append(f'<section id="{escape(name)}"><h2>{escape(name)}: {_asked(lines)}</h2>{table}{shown}</section>')
    failed = "".join(f'<p class="missing"><b>{escape(k)}</b> failed: {escape(v)}</p>' for k, v in errors.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{escape(title)}</h1><p>{escape(legend)}</p></header>
<main>{"".join(parts)}{failed}</main></body></html>
"""
