"""Line charts as inline SVG: nice ticks, linear or log scale, thinned to what a screen can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

Point = tuple[float, float]
LIMIT = 800  # most points drawn a series; a screen shows no more
DASHES = ("none", "7 4", "2 4", "9 3 2 3", "12 4", "4 2")  # one for each colour, so that colour is never the only sign


@dataclass(frozen=True)
class Series:
    """One line of a chart. kind: "line", "raw" (thin and pale, below a smoothed line) or "dots" (a line with marks)."""

    name: str
    points: Sequence[Point]
    kind: str = "line"
    color: int = 0


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] in data units to [start, stop] in pixels; `log` needs low > 0."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` steps of 1, 2, 2.5 or 5 times a power of ten; first <= low and last >= high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)) or high - low < 1e-300:
        pad = 0.1 * abs(low) if abs(low) > 1e-200 else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = math.floor(math.log10(rough))
    step = next(m * 10.0**power for m in (1, 2, 2.5, 5, 10) if m * 10.0**power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 2 - power) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten (with 2 and 5 times them over few decades) from at most `low` to at least `high`; low > 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors, stride = ((1, 2, 5), 1) if last - first <= 2 else ((1,), math.ceil((last - first) / 6))
    every = [f * 10.0**k for k in range(first, last + stride + 1, stride) for f in factors]
    start = max(i for i, t in enumerate(every) if t <= low * (1 + 1e-9))
    stop = min(i for i, t in enumerate(every) if t >= high * (1 - 1e-9))
    return every[start : max(stop, start + 1) + 1]


def number(value: float) -> str:
    """A short figure: 0.25, 12.5k, 7.06B, 4e-4."""
    size = abs(value)
    for floor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if floor <= size < 1e15:
            return f"{value / floor:.4g}{unit}"
    return _power(value) if size and (size < 1e-3 or size >= 1e15) else f"{value:.4g}"


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def thin(points: Sequence[Point], limit: int = LIMIT) -> list[Point]:
    """At most `limit` points with the same outline: the ends, and the lowest and highest of each of equal buckets."""
    if len(points) <= limit:
        return list(points)
    buckets, inner = (limit - 2) // 2, len(points) - 2
    kept = [points[0]]
    for b in range(buckets):
        bucket = range(1 + b * inner // buckets, 1 + (b + 1) * inner // buckets)
        low, high = min(bucket, key=lambda i: points[i][1]), max(bucket, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({low, high})]
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean over `window` points, twice (a triangular kernel); the window narrows towards both ends.

    A full window at the ends would draw the first, steepest part of a loss curve too low.
    """
    values, last, half = [y for _, y in points], len(points) - 1, window // 2
    for _ in range(2):
        sums = list(accumulate(values, initial=0.0))
        reach = [max(min(half, i, last - i), half // 4) for i in range(len(values))]
        spans = [(max(0, i - r), min(last, i + r) + 1) for i, r in enumerate(reach)]
        values = [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def drawable(points: Sequence[Point], log: bool = False) -> list[Point]:
    """The finite points in order of x; on a log scale the positive ones."""
    low = 1e-300 if log else -1e300
    return sorted((x, y) for x, y in points if math.isfinite(x) and low < y < 1e300)


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    width: int = 720,
    height: int = 300,
    log: bool = False,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """One chart as an `<svg>`; points that are not finite (or, with `log`, not positive) are left out.

    Args:
        width, height: of the view box, in pixels at natural size.
        log: y on a log scale.
        zero: y from zero.
        marks: (x, text) of vertical lines.
    """
    shown = [Series(s.name, thin(points), s.kind, s.color) for s in series if (points := drawable(s.points, log))]
    if not shown:
        return f'<p class="missing">{escape(title)}: no finite values to draw.</p>'
    ys = [y for s in shown for _, y in s.points] + ([0.0] if zero and not log else [])
    xs = [x for s in shown for x, _ in s.points]
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys), 5 if height > 240 else 4)
    low, high = (0.0 if 0 < min(xs) < 0.1 * max(xs) else min(xs)), max(xs)
    x_ticks = [t for t in ticks(low, high, width // 90) if low <= t <= high and t == int(t)]
    if low == high:
        low, high, x_ticks = low - 1, high + 1, [low]
    x = Scale(low, high, 66, width - 14)
    legend, rows = _legend(shown, width)
    y = Scale(y_ticks[0], y_ticks[-1], height - 44, 32 + 17 * rows, log)
    axes = f"{low:.9g} {high:.9g} {x.start} {x.stop} {y.low:.9g} {y.high:.9g} {y.start} {y.stop}"
    ranges = "; ".join(f"{s.name}: {_span(s.points)}" for s in shown)
    middle = (y.start + y.stop) / 2
    body = [
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" data-axes="{axes}" data-log="{int(log)}">',
        f"<title>{escape(title)}</title><desc>{escape(f'{y_label} by {x_label}. {ranges}.')}</desc>",
        f'<text class="title" x="0" y="14">{escape(title)}</text>',
        _axes(x, y, x_ticks, y_ticks),
        f'<text x="{(x.start + x.stop) / 2:.1f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
        *(_mark(x(at), y, text) for at, text in marks if low <= at <= high),
        *(_line(s, x, y) for s in shown),
        legend,
        f'<line class="hover" style="display:none" y1="{y.start}" y2="{y.stop}"/>',
        f'<text class="readout" x="{width}" y="14" text-anchor="end"/></svg>',
    ]
    return "\n".join(part for part in body if part)


def _span(points: Sequence[Point]) -> str:
    values = [y for _, y in points]
    low, high = number(min(values)), number(max(values))
    return f"from {number(values[0])} to {number(values[-1])}, lowest {low}, highest {high}"


def _tick_labels(values: Sequence[float], log: bool) -> list[str]:
    """Labels in one style for a scale: 0.00 0.25 0.50, 0 2e-4 4e-4, 0 5k 10k, 1e-4 1e-3."""
    size = max(abs(v) for v in values)
    if log and min(values) < 1e-3:
        return [_power(v) for v in values]
    if log or size >= 1e4:
        return [number(v) for v in values]
    if size < 1e-2:
        return [_power(v) if v else "0" for v in values]
    decimals = max(len(f"{v:.6g}".partition(".")[2]) for v in values)
    return [f"{v:,.{decimals}f}" for v in values]


def _axes(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    parts = []
    for value, label in zip(y_ticks, _tick_labels(y_ticks, y.log), strict=True):
        at = y(value)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.start - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in zip(x_ticks, _tick_labels(x_ticks or [0.0], False), strict=False):
        at, foot = x(value), y.start
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{foot:.1f}" y2="{foot + 5:.1f}"/>')
        parts.append(f'<text x="{at:.1f}" y="{foot + 19:.1f}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{y.start:.1f}" y2="{y.start:.1f}"/>')
    return "\n".join(parts)


def _mark(at: float, y: Scale, text: str) -> str:
    line = f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.stop:.1f}"/>'
    return f'{line}<text x="{at - 5:.1f}" y="{y.stop + 11:.1f}" text-anchor="end">{escape(text)}</text>'


def _stroke(series: Series) -> str:
    look = series.color % len(DASHES)
    raw = " raw" if series.kind == "raw" else ""
    return f'class="series{raw}" stroke="var(--c{look})" stroke-dasharray="{DASHES[look]}"'


def _line(series: Series, x: Scale, y: Scale) -> str:
    """The polyline, with a round mark at its end, at each point of "dots", and for a single point."""
    places = [(x(a), y(b)) for a, b in series.points]
    dots = places if series.kind == "dots" and len(places) <= 60 else places[-1:]
    if series.kind == "raw" and len(places) > 1:
        dots = []
    coordinates = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    fill = f"var(--c{series.color % len(DASHES)})"
    return f'<polyline {_stroke(series)} data-name="{escape(series.name)}" points="{coordinates}"/>' + "".join(
        f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{fill}"/>' for a, b in dots
    )


def _legend(series: Sequence[Series], width: int) -> tuple[str, int]:
    """One entry a series, in as many rows as `width` asks for. Returns: the markup and the number of rows."""
    if len(series) == 1:
        return "", 0
    parts, left, row = [], 0.0, 0
    for s in series:
        size = 44 + 6.6 * len(s.name)
        if left and left + size > width:
            left, row = 0.0, row + 1
        top = 31 + 17 * row
        parts.append(f'<line {_stroke(s)} x1="{left:.0f}" x2="{left + 22:.0f}" y1="{top}" y2="{top}"/>')
        parts.append(f'<text x="{left + 28:.0f}" y="{top + 4}">{escape(s.name)}</text>')
        left += size
    return "".join(parts), row + 1
