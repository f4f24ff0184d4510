"""The wrong answers of an evaluation with their pictures: one HTML file with everything inside it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vlmpeft import fs

FILE = "wrong.html"
SHOWN = 60  # wrong answers on a page, unless the command line asks for more
FACTS = ("parser", "method", "ablate", "template", "model_fingerprint", "questions_sha256")
COUNTS = {"unparsable": "Unparsable", "by_chance": "Decided by chance", "empty": "Empty"}


@dataclass(frozen=True)
class Wrong:
    """A question that was answered wrong.

    expected: the right answer, for people. said: the text as it came. parsed: what the parser made of it, if there is
    one. pictures: files, or the bytes of such. kind: the group the question belongs to.
    """

    question_id: str
    question: str
    expected: str
    said: str
    parsed: str | None = None
    pictures: tuple[Path | bytes, ...] = ()
    kind: str = ""


def write_wrong(path: Path, wrong: Sequence[Wrong], metrics: Mapping[str, Any], shown: int = SHOWN) -> None:
    """Write the page: at most `shown` answers, evenly spread, and how many are left out; the same input, same bytes."""
    page = _page(wrong, metrics, shown)
    fs.write_text(path, page.encode("utf-8", "replace").decode())  # texts may hold lone surrogates


def _page(wrong: Sequence[Wrong], metrics: Mapping[str, Any], shown: int) -> str:
    from vlmpeft.report_style import STYLE

    chosen = [wrong[i * len(wrong) // shown] for i in range(shown)] if len(wrong) > shown else list(wrong)
    title = escape(f"Wrong answers: {metrics.get('benchmark', 'evaluation')}")
    facts = " · ".join(f"{key} {metrics[key]}" for key in FACTS if metrics.get(key) is not None)
    left = f"{len(chosen)} of {len(wrong):,} wrong answers, evenly spread; {len(wrong) - len(chosen):,} are left out."
    note = left if len(chosen) < len(wrong) else f"All {len(wrong):,} wrong answers." if wrong else "No wrong answers."
    cards = "".join(map(_card, chosen))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head>
<body><header><h1>{title}</h1><p>{escape(facts)}</p>{_tiles(len(wrong), metrics)}</header>
<main><section><h2>Answers</h2><p class="note">{note}</p><div class="samples">{cards}</div></section></main>
</body></html>
"""


def _tiles(wrong: int, metrics: Mapping[str, Any]) -> str:
    accuracy = metrics.get("accuracy", metrics.get("mean_accuracy"))
    tiles = []
    if isinstance(accuracy, float):
        low, high = metrics.get("accuracy_ci95", (None, None))
        note = f"95 % interval {100 * low:.1f} to {100 * high:.1f}" if low is not None else ""
        tiles.append(("Accuracy, %", f"{100 * accuracy:.1f}", note))
    of, answers = (f"of {metrics['n']:,} {what}" if "n" in metrics else "" for what in ("questions", "answers"))
    tiles.append(("Wrong", f"{wrong:,}", of))
    tiles += [(label, f"{metrics[key]:,}", answers) for key, label in COUNTS.items() if key in metrics]
    cells = (f"<b>{a}</b><strong>{b}</strong><span>{c}</span>" for a, b, c in tiles)
    return f'<div class="tiles">{"".join(f"""<div class="tile">{cell}</div>""" for cell in cells)}</div>'


def _card(wrong: Wrong) -> str:
    """One answer: pictures, group, number, question, right answer, what was said and what was read of it."""
    pictures = "".join(_picture(image, wrong.question_id) for image in wrong.pictures)
    if len(wrong.pictures) > 1:
        pictures = f'<div class="pictures">{pictures}</div>'
    terms = [("Right answer", wrong.expected), ("Said", wrong.said or "nothing")]
    terms += [("Read as", wrong.parsed)] if wrong.parsed is not None else []
    answers = "".join(f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in terms)
    return (
        f'<article class="sample wrong">{pictures}<div><div class="top"><span>{escape(wrong.kind)}</span>'
        f"<b>{escape(wrong.question_id)}</b></div><p>{escape(wrong.question)}</p><dl>{answers}</dl></div></article>\n"
    )


def _picture(image: Path | bytes, question_id: str) -> str:
    from vlmpeft.report import thumbnail

    uri = thumbnail(image if isinstance(image, Path) else io.BytesIO(image))
    alt = escape(f"Picture that question {question_id} is about")
    return f'<img src="{uri}" alt="{alt}">' if uri else '<div class="gone">picture cannot be read</div>'
