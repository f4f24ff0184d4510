"""The report of a run: one HTML file with everything inside it, for any browser, light, dark, narrow or printed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageOps

from vlmpeft import fs
from vlmpeft.errors import CheckpointError
from vlmpeft.report_data import Row, Run, read_run
from vlmpeft.report_retention import retention
from vlmpeft.report_sections import evaluation, headline, parameters, training
from vlmpeft.report_style import SCRIPT, STYLE

CARDS = 24  # most samples shown
THUMBNAIL = 400  # pixels, longest side
MARKS = {"right": "✓ right", "wrong": "✗ wrong", "open": "not scored"}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from whichever inputs are there; a section without its input says so in one line.

    Inputs: recipe.yaml, metrics.jsonl, summary.json, evaluation.json, retention.json, samples.jsonl. The same inputs
    give the same bytes.
    Returns: the path of the report.
    Raises: CheckpointError K240 if `run_dir` is no directory.
    """
    if not run_dir.is_dir():
        raise CheckpointError("K240", f"no run directory {run_dir}.", "give the run.dir of a run that has started.")
    target = run_dir / "report.html"
    page = _page(read_run(run_dir))
    fs.write_text(target, page.encode("utf-8", "replace").decode())  # JSON may hold lone surrogates
    return target


def _page(run: Run) -> str:
    """The whole page: header with links, the sections, and a line for each section left out."""
    title = escape(str(run.summary.get("title") or run.directory.resolve().name))
    links, body = "", ""
    for anchor, name, source, build in SECTIONS:
        if content := build(run):
            links += f'<a href="#{anchor}">{name}</a>'
            body += f'<section id="{anchor}"><h2>{name}</h2>{content}</section>\n'
        else:
            reason = run.why.get(source, f"{source} holds nothing for it")
            body += f'<p class="missing"><b>{name}</b> left out: {escape(reason)}.</p>\n'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head>
<body><header><h1>{title}</h1><p>Training report of {escape(run.directory.resolve().name)}</p>
<nav>{links}</nav>{headline(run)}</header>
<main>{body}</main><script>{SCRIPT}</script></body></html>
"""


def thumbnail(picture: Path | IO[bytes]) -> str:
    """A data URI of a picture as JPEG, at most THUMBNAIL pixels wide and high; "" if it cannot be read."""
    try:
        with Image.open(picture) as image:
            image.draft("RGB", (THUMBNAIL * 2, THUMBNAIL * 2))
            small = ImageOps.exif_transpose(image)
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            small.convert("RGB").save(buffer, "JPEG", quality=82)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def choose(samples: list[Row]) -> list[Row]:
    """At most CARDS samples, evenly spaced through the file, half of them wrong answers where there are so many."""
    wrong = [i for i, s in enumerate(samples) if s.get("correct") is False]
    rest = [i for i, s in enumerate(samples) if s.get("correct") is not False]
    few = min(len(wrong), max(CARDS // 2, CARDS - len(rest)))

    def spread(items: list[int], count: int) -> list[int]:
        count = min(count, len(items))
        return [items[i * len(items) // count] for i in range(count)]

    return [samples[i] for i in sorted(spread(wrong, few) + spread(rest, CARDS - few))]


def _card(run: Run, sample: Row) -> str:
    """One sample: picture, type, mark, question, right answer, answers before and after."""
    picture = thumbnail(run.directory / str(sample.get("image", "")))  # an absolute path stays as it is
    question = escape(str(sample.get("question", "")))
    shown = f'<img src="{picture}" alt="Picture asked about">'
    top = shown if picture else '<div class="gone">picture cannot be read</div>'
    correct = sample.get("correct")
    look = "right" if correct is True else "wrong" if correct is False else "open"
    terms = (("Right answer", "label"), ("Before", "before"), ("After", "after"))
    answers = "".join(f"<dt>{t}</dt><dd>{escape(str(sample[k]))}</dd>" for t, k in terms if sample.get(k) is not None)
    kind = escape(str(sample.get("category", "")))
    return (
        f'<article class="sample {look}">{top}<div><div class="top"><span>{kind}</span><b>{MARKS[look]}</b></div>'
        f"<p>{question}</p><dl>{answers}</dl></div></article>"
    )


def _samples(run: Run) -> str:
    """The chosen samples as cards, with a choice of right or wrong ones."""
    chosen = choose(run.samples)
    if not chosen:
        return ""
    right, wrong = (sum(s.get("correct") is v for s in chosen) for v in (True, False))
    note = f"{len(chosen)} of {len(run.samples):,} samples: after training {right} of them are right, {wrong} wrong."
    if len(chosen) < len(run.samples):
        note += " Chosen to show both, so their share of right answers is not the accuracy."
    buttons = "".join(
        f'<label><input type="radio" name="only" id="only-{k}"{" checked" if k == "all" else ""}>{k}</label>'
        for k in ("all", "right", "wrong")
    )
    cards = "".join(_card(run, s) for s in chosen)
    return f'<p class="note">{note}</p><div class="filter">{buttons}</div><div class="samples">{cards}</div>'


def _recipe(run: Run) -> str:
    if not run.recipe.strip():
        return ""
    return f"<details><summary>recipe.yaml, as resolved</summary><pre>{escape(run.recipe)}</pre></details>"


def _versions(run: Run) -> str:
    versions = run.summary.get("versions")
    if not isinstance(versions, dict) or not versions:
        return ""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(_plain(v))}</dd>" for k, v in versions.items())
    return f'<div class="card"><dl>{rows}</dl></div>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


SECTIONS: tuple[tuple[str, str, str, Callable[[Run], str]], ...] = (
    ("evaluation", "Before and after", "evaluation.json", evaluation),
    ("retention", "Retention", "retention.json", retention),
    ("training", "Training", "metrics.jsonl", training),
    ("parameters", "Trainable parameters", "summary.json", parameters),
    ("samples", "Samples", "samples.jsonl", _samples),
    ("recipe", "Recipe", "recipe.yaml", _recipe),
    ("versions", "Versions", "summary.json", _versions),
)
