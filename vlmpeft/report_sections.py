"""The figures of a run's report as HTML fragments: headline, training curves, parameters, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import median

from vlmpeft.charts import Point, Series, line_chart, number, smooth
from vlmpeft.report_attention import attention
from vlmpeft.report_data import Row, Run, dicts, duration, figure, interval, num, percent

GROUPS = 6  # most learning rates drawn
ABLATED = (("blank", "Image blanked"), ("shuffle", "Another image"), ("noise", "Noise for image"))
STATES = (("before", "Before"), ("after", "After"), *ABLATED)
MEASURES = {"accuracy": "Accuracy", "f1": "F1", "precision": "Precision", "recall": "Recall", "auc": "AUC"}
NEUTRAL = {"yes_ratio": "Answered yes"}  # neither more nor less is better


def pick(run: Run, state: str, name: str) -> Row:
    """The metrics of benchmark `name` in one of STATES."""
    return next((m for m in dicts(run.evaluation.get(state)) if str(m.get("name", "")) == name), {})


def benchmarks(run: Run) -> list[str]:
    """The names of the benchmarks scored, in order of appearance."""
    return list(dict.fromkeys(str(m.get("name", "")) for s, _ in STATES for m in dicts(run.evaluation.get(s))))


def _tile(label: str, value: str, note: str = "", look: str = "") -> str:
    return f'<div class="tile {look}"><b>{escape(label)}</b><strong>{value}</strong><span>{escape(note)}</span></div>'


def _accuracy_tiles(run: Run, name: str) -> list[str]:
    """Accuracy before -> after with its 95 % interval, and without the image."""
    accuracy = {state: percent(pick(run, state, name).get("accuracy")) for state, _ in STATES}
    before, after = accuracy["before"], accuracy["after"]
    title, tiles, n = name or "Benchmark", [], num(pick(run, "after", name).get("n"))
    if after is not None:
        notes = [f"{after - before:+.1f} points"] if before is not None else []
        if n and n > 0:
            low, high = interval(min(after, 100) / 100, n)
            notes.append(f"95 % interval {low:.1f} to {high:.1f}, n = {n:,.0f}")
        start = f"<i>{before:.1f}</i><em>→</em>" if before is not None else ""
        tiles.append(_tile(f"{title} accuracy, %", f"{start}{after:.1f}", "; ".join(notes), "key"))
    for state, label in ABLATED:
        if (without := accuracy[state]) is not None:
            note = f"{without - after:+.1f} points against the real image" if after is not None else ""
            tiles.append(_tile(f"{title}, {label[0].lower()}{label[1:]}, %", f"{without:.1f}", note))
    return tiles


def headline(run: Run) -> str:
    """Final loss of each stage, accuracy before and after, accuracy with the image blanked, time."""
    tiles = [tile for name in benchmarks(run) for tile in _accuracy_tiles(run, name)]
    for name, stage in run.stages().items():
        curve = run.curve(name, "loss")
        label, final = "Final loss", num(stage.get("final_loss"))
        if final is None and curve:
            label, final = "Last logged loss", curve[-1][1]
        if final is not None:
            note = f"from {number(curve[0][1])} at step {curve[0][0]:,.0f}" if curve else ""
            tiles.append(_tile(f"{label}, {name}", f"{final:.3f}", note))
    stages = dicts(run.summary.get("stages"))
    if seconds := sum(num(s.get("seconds")) or 0 for s in stages):
        steps = sum(num(s.get("steps")) or 0 for s in stages)
        tiles.append(_tile("Training time", duration(seconds), f"{steps:,.0f} steps"))
    data = run.summary.get("data")
    if isinstance(data, dict) and (used := num(data.get("used"))) is not None:
        records, skipped = num(data.get("records")), num(data.get("skipped"))
        note = f"of {figure(records, '{:,.0f}')}; {figure(skipped, '{:,.0f}')} skipped"
        if animated := num(data.get("animated")):
            note += f"; images of several frames, the first shown: {animated:,.0f}"
        tiles.append(_tile("Records used", f"{used:,.0f}", note))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _smoothed(points: Sequence[Point]) -> list[Series]:
    """The logged points, pale, under their running mean; few points are drawn as they are."""
    if len(points) < 12:
        return [Series("logged", points, "dots")]
    window = max(3, len(points) // 30 | 1)
    return [Series("logged", points, "raw"), Series(f"mean of {window}", smooth(points, window))]


def _wide_range(points: Sequence[Point], factor: float) -> bool:
    """True if a linear scale would flatten the curve: the highest value is over `factor` times the median."""
    values = [y for _, y in points]
    return bool(values) and min(values) > 0 and max(values) > factor * median(values)


def _rates(run: Run, stage: str) -> str:
    rows = [
        r["lrs"] for r in run.metrics if str(r.get("stage", "training")) == stage and isinstance(r.get("lrs"), dict)
    ]
    groups: list[str | None] = list(dict.fromkeys(str(g) for rates in rows for g in rates)) or [None]
    curves = [(g or "all", run.curve(stage, "lrs" if g else "lr", g)) for g in groups]
    series = [Series(name, points, color=i) for i, (name, points) in enumerate(curves[:GROUPS])]
    peaks = [max(y for _, y in points) for _, points in curves[:GROUPS] if points]
    log = bool(peaks) and min(peaks) > 0 and max(peaks) >= 20 * min(peaks)
    if log:  # a decay to zero would take the whole scale
        series = [Series(s.name, [p for p in s.points if p[1] >= min(peaks) / 100], s.kind, s.color) for s in series]
    title = "Learning rate" + (f" ({GROUPS} of {len(curves)} groups)" if len(curves) > GROUPS else "")
    label = "learning rate, log scale" if log else "learning rate"
    return line_chart(title, series, "optimiser step", label, width=370, height=240, log=log)


def _stage(run: Run, name: str, stage: Row) -> str:
    """One stage: a line of facts, the loss in full width, three small charts."""
    loss, held_out = run.curve(name, "loss"), run.curve(name, "eval_loss")
    best = num(stage.get("best_step"))
    steps, samples, seconds = (num(stage.get(k)) for k in ("steps", "samples", "seconds"))
    facts = [f"{v:,.0f} {k}" for k, v in (("steps", steps), ("samples", samples)) if v is not None]
    facts += [duration(seconds)] if seconds is not None else []
    rows = [r for r in run.metrics if str(r.get("stage", "training")) == name and "loss" in r]
    if lost := sum(num(r["loss"]) is None for r in rows):
        facts.append(f"not drawn, because not finite: {lost} of {len(rows):,} losses")
    series = _smoothed(loss) + ([Series("held out", held_out, "dots", 1)] if held_out else [])
    log = _wide_range(loss, 8)
    marks = [(best, "best")] if best is not None else []
    hero = [
        line_chart(
            f"Loss, {name}", series, "optimiser step", f"loss (nats per token{', log' if log else ''})",
            width=width, height=height, log=log, marks=marks,
        )
        for width, height in ((1080, 340), (400, 280))
    ]  # fmt: skip
    small = [_rates(run, name)]
    for key in dict.fromkeys(k for row in run.metrics for k in row if k.startswith("eval.")):  # of run.best_by
        if points := run.curve(name, key):
            marked = [Series(key, points, "dots", 1)]
            small.append(line_chart(key, marked, "optimiser step", "higher is better", width=370, height=240))
    for key, title, label in (("grad_norm", "Gradient norm", "L2 norm"), ("tokens_per_s", "Throughput", "tokens/s")):
        points = run.curve(name, key)
        log = key == "grad_norm" and _wide_range(points, 30)
        label += ", log scale" if log else ""
        chart = line_chart(title, _smoothed(points), "optimiser step", label, width=370, height=240, log=log, zero=True)
        small.append(chart)
    figures = "".join(f"<figure>{chart}</figure>" for chart in small)
    return (
        f"<h3>{escape(name)} <small>{escape(' · '.join(facts))}</small></h3>"
        f'<div class="card"><figure class="wide">{hero[0]}</figure><figure class="narrow">{hero[1]}</figure>'
        f'<div class="small">{figures}</div>{attention(run, name)}</div>'
    )


def training(run: Run) -> str:
    """The curves of every stage that logged something."""
    logged = {str(row.get("stage", "training")) for row in run.metrics}
    return "".join(_stage(run, name, stage) for name, stage in run.stages().items() if name in logged)


def _parameters(rows: Sequence[Row]) -> tuple[float, float]:
    """Trainable and all parameters of some rows; rows of one part that give the same total mean the same weights."""
    totals = {(str(r.get("part")), num(r.get("total")) or 0) for r in rows}
    return sum(num(r.get("trainable")) or 0 for r in rows), sum(total for _, total in totals)


def _parameter_cells(rows: Sequence[Row]) -> str:
    if not rows:
        return '<td colspan="3" class="none">&ndash;</td>'
    trainable, total = _parameters(rows)
    share = f"{100 * trainable / total:.3g} %" if total and trainable else "&ndash;"
    count = f"{trainable:,.0f}" if trainable else '<span class="frozen">frozen</span>'
    return f"<td>{count}</td><td>{total:,.0f}</td><td>{share}</td>"


def parameters(run: Run) -> str:
    """Trainable and all parameters per part, the stages side by side, with totals."""
    stages = {n: rows for n, s in run.stages().items() if (rows := dicts(s.get("trainable")))}
    if not stages:
        return ""

    def key(row: Row) -> tuple[str, str]:
        return str(row.get("part", "")), str(row.get("name", ""))

    body = ""
    for part, name in dict.fromkeys(key(row) for rows in stages.values() for row in rows):
        own = ([row for row in rows if key(row) == (part, name)] for rows in stages.values())
        body += f"<tr><th>{escape(part)} <small>{escape(name)}</small></th>{''.join(map(_parameter_cells, own))}</tr>"
    names = "".join(f'<th colspan="3" class="group">{escape(name)}</th>' for name in stages)
    units = "<th>trainable</th><th>all</th><th>share</th>" * len(stages)
    totals = "".join(map(_parameter_cells, stages.values()))
    return (
        f'<div class="card scroll"><table><thead><tr><th></th>{names}</tr><tr><th>Part</th>{units}</tr></thead>'
        f"<tbody>{body}</tbody><tfoot><tr><th>Total</th>{totals}</tr></tfoot></table></div>"
    )


def _compared(label: str, n: float | None, values: dict[str, float | None], judged: bool) -> str:
    """One row: bars and figures of every state, in percent."""
    before, after = values.get("before"), values.get("after")
    change = after - before if after is not None and before is not None else None
    look = "" if change is None or not judged or abs(change) < 0.05 else "up" if change > 0 else "down"
    sign = {"up": "▲ ", "down": "▼ "}.get(look, "")
    bars = "".join(
        f'<i class="{state}" style="width:{min(max(v, 0), 100):.1f}%"></i>'
        for state, v in values.items()
        if v is not None
    )
    count = f" <small>n = {n:,.0f}</small>" if n is not None else ""
    cells = [figure(before), figure(after), sign + figure(change, "{:+.1f}")]
    cells += [figure(values[state]) for state, _ in ABLATED if state in values]
    looks = ["", "", f' class="{look}"', *[""] * len(ABLATED)]
    return (
        f'<tr><th><div class="measure"><span>{escape(label)}{count}</span><div class="bars">{bars}</div></div></th>'
        f"{''.join(f'<td{k}>{c}</td>' for k, c in zip(looks, cells, strict=False))}</tr>"
    )


def evaluation(run: Run) -> str:
    """A table for each benchmark: its measures, then accuracy per question type, before, after and without the image.

    The image blanked has a column always, other ablations where they were asked for.
    """
    out, seen = "", {"before", "after", "blank", *run.evaluation}
    shown = [(state, label) for state, label in STATES if state in seen]
    for name in benchmarks(run):
        states = {state: pick(run, state, name) for state, _ in shown}
        body = ""
        for key, label in (MEASURES | NEUTRAL).items():
            values = {state: percent(m.get(key)) for state, m in states.items()}
            if any(v is not None for v in values.values()):
                body += _compared(label, None, values, key in MEASURES)
        types = {state: c if isinstance(c := m.get("categories"), dict) else {} for state, m in states.items()}
        kinds = dict.fromkeys(k for c in types.values() for k in c)
        if kinds:
            body += f'<tr class="divider"><th colspan="{len(shown) + 2}">Accuracy by question type</th></tr>'
        for kind in kinds:
            cells = {state: next(iter(dicts(c.get(kind))), {}) for state, c in types.items()}
            n = next((v for c in cells.values() if (v := num(c.get("n"))) is not None), None)
            body += _compared(str(kind), n, {state: percent(c.get("accuracy")) for state, c in cells.items()}, True)
        columns = {"blank": "Blanked", "shuffle": "Exchanged", "noise": "Noise"}
        heads = "".join(f"<th>{h}</th>" for h in ("Before", "After", "Change", *(columns[s] for s, _ in shown[2:])))
        n = next((v for m in states.values() if (v := num(m.get("n"))) is not None), None)
        note = f" <small>{n:,.0f} questions</small>" if n is not None else ""
        out += f'<h3>{escape(name or "Benchmark")}{note}</h3><div class="card scroll"><table class="compare">'
        out += f"<thead><tr><th>In percent</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    legend = "".join(f'<span><i class="{state}"></i>{label}</span>' for state, label in shown)
    return out and f'<p class="key-line">{legend}</p>{out}'
