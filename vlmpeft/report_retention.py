"""What the language model still knows without images, before and after training, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlmpeft.report_data import Row, Run, dicts, figure, interval, num, percent

MOMENTS = ("before", "after")


def _row(label: str, note: str, values: Sequence[float | None], form: str, better: int) -> str:
    """One measure before, after, and its change. Args: better: 1 if more is better, -1 if less is."""
    before, after = values
    change = None if before is None or after is None else after - before
    look = "" if not change else "up" if change * better > 0 else "down"
    sign = "" if not change else "▲ " if change > 0 else "▼ "
    cells = f"<td>{figure(before, form)}</td><td>{figure(after, form)}</td>"
    changed = sign + figure(change, form.replace("{:", "{:+"))
    return f'<tr><th>{label} <small>{escape(note)}</small></th>{cells}<td class="{look}">{changed}</td></tr>'


def retention(run: Run) -> str:
    """A table of perplexity and multiple choice, with how little the set is; "" without results."""
    moments: list[Row] = [next(iter(dicts(run.retention.get(moment))), {}) for moment in MOMENTS]
    body, facts = "", moments[1] or moments[0]
    perplexity = [num(m.get("perplexity")) for m in moments]
    if any(v is not None for v in perplexity):
        counts = [figure(num(facts.get(key)), "{:,.0f}") for key in ("tokens", "texts")]
        body += _row("Perplexity", f"{counts[0]} tokens of {counts[1]} texts", perplexity, "{:.3f}", -1)
    accuracy = [percent(m.get("accuracy")) for m in moments]
    if any(v is not None for v in accuracy):
        n, share = num(facts.get("questions")), num(facts.get("accuracy"))
        note = f"n = {figure(n, '{:,.0f}')}"
        if n and share is not None:
            low, high = interval(min(max(share, 0.0), 1.0), n)
            note += f", 95 % interval {low:.1f} to {high:.1f}"
        body += _row("Multiple choice, %", note, accuracy, "{:.1f}", 1)
    heads = "".join(f"<th>{h}</th>" for h in ("Before", "After", "Change"))
    table = f'<table class="compare"><thead><tr><th>Text alone</th>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return body and f'<div class="card scroll">{table}</div>'
