"""Figures of LMAR for papers: ratio and visual mass per layer, attention over a photo. Letters: l layers."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00")  # Okabe and Ito (2008): for all eyes
LEGEND = 84  # letters and more that one line of the legend has room for; a line's sample takes about six
TITLE = 24  # letters that a line of a heat map's title has room for
MARKERS = ("o", "s", "^", "D", "v", "P")
NARROW = 8  # highest over lowest ratio below which 1, 2, 5 are too few labels for the axis
DASHES = ("-", "--", ":", "-.")  # of the seventh line on, colours and markers come again
STYLE: Any = {  # of matplotlib
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#444444", "axes.linewidth": 0.8,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False, "savefig.dpi": 200,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One model's figures, (l,) each, NaN where a layer has none: mean ratio, its 95 % interval, visual mass."""

    name: str
    ratio: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    mass: Sequence[float]


def layers_figure(lines: Sequence[Line], title: str = "LMAR, mean and 95 % interval") -> bytes:
    """PNG of LMAR (log axis, a line at 1) and of the attention's share on the image, per layer, models overlaid."""
    from matplotlib import rc_context
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    with rc_context(STYLE):
        names = [_short(line.name, LEGEND - 9) for line in lines]
        columns = max(1, min(4, len(lines), LEGEND // (6 + max(map(len, names)))))
        figure = figure_of(7.2, 2.95 + 0.19 * math.ceil(len(lines) / columns))
        ratio, mass = figure.subplots(1, 2)
        ratio.axhline(1, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ratio.annotate(
            "an image token gets as much as a text token", (0.99, 1), (0, 3), xycoords=ratio.get_yaxis_transform(),
            textcoords="offset points", ha="right", va="bottom", fontsize=7, color="#444444", zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],  # readable over a line that crosses it
        )  # fmt: skip
        for number, (name, line) in enumerate(zip(names, lines, strict=True)):
            layers = range(len(line.ratio))
            colour = COLOURS[number % len(COLOURS)]
            look = {
                "color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 3, "linewidth": 1.4,
                "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
            }  # fmt: skip
            ratio.plot(layers, line.ratio, label=name, **look)
            ratio.fill_between(layers, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
            mass.plot(layers, [100 * m for m in line.mass], **look)
        ratio.set(yscale="log", title=title, ylabel="image / text attention per token")
        low, high = _log_limits(lines)
        ratio.set_ylim(low, high)
        if high / low < NARROW:
            ratio.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))  # so that 1 is one of them
            ratio.yaxis.set_minor_locator(NullLocator())
        else:
            ratio.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        ratio.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ratio.yaxis.set_minor_formatter(NullFormatter())
        mass.set(title="Visual attention", ylabel="attention on the image, %")
        mass.set_ylim(0, 1.08 * max(100 * np.nanmax([m for line in lines for m in line.mass]), 1e-6))
        for axes in (ratio, mass):
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        if len(lines) > 1:
            figure.legend(*ratio.get_legend_handles_labels(), loc="outside upper center", ncols=columns)
        return png_of(figure)


def _short(text: str, most: int) -> str:
    """At most so many letters: the end, which tells names of runs apart."""
    return text if len(text) <= most else "\u2026" + text[1 - most :]


def _log_limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Of the ratios and 1, with room above for the note at 1."""
    values = [v for line in lines for row in (line.ratio, line.low, line.high) for v in row if v > 0]
    low, high = min([1.0, *values]), max([1.0, *values])
    return low / 1.3, high * max(1.3, (high / low) ** 0.12)


@dataclass(frozen=True)
class Heat:
    """Attention over a photo. weights: (rows, columns) of shares. box: what of the photo they cover, in its pixels."""

    title: str
    weights: Any
    box: tuple[float, float, float, float]


def heat_figure(photo: Image.Image, heats: Sequence[Heat], caption: str) -> bytes:
    """PNG of a photo beside itself under each heat map, all on one scale that ends at the 98th percentile.

    A single token that many heads rest on (a sink) would otherwise leave the rest of the scale empty. Maps of unequal
    grids, as of two projectors, are compared by area: a token of the finer one covers less of the photo.
    Args: caption: the question and the answer, with the token that is explained.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        panels = len(heats) + 1
        height = 2.3 * min(1.6, photo.height / photo.width)
        below, above = max(1, len(caption.splitlines())), max(len(heat.title.splitlines()) for heat in heats)
        figure = figure_of(2.35 * panels + 0.5, height + 0.25 + 0.15 * below + 0.2 * above)
        first, *others = figure.subplots(1, panels, squeeze=False)[0]
        alike = len({np.shape(heat.weights) for heat in heats}) == 1
        percents = [np.asarray(heat.weights, np.float32) * (100 if alike else np.size(heat.weights)) for heat in heats]
        most = max(float(np.percentile(np.concatenate([percent.ravel() for percent in percents]), 98)), 1e-6)
        first.imshow(photo)
        first.set_title("image")
        for axes, heat, values in zip(others, heats, percents, strict=True):
            axes.imshow(np.asarray(photo.convert("L")), cmap="gray", vmin=0, vmax=255)
            percent = _upsampled(values, heat.box, photo.size)
            seen = 0.8 * (percent / most).clip(0, 1) ** 0.6  # where there is little attention, the photo is left clear
            shown = axes.imshow(percent, cmap="inferno", vmin=0, vmax=most, alpha=seen)
            axes.set_title("\n".join(_short(line, TITLE) for line in heat.title.splitlines()))
        for axes in (first, *others):
            axes.set_axis_off()
        bar = figure.colorbar(shown, ax=others, fraction=0.05, pad=0.02, shrink=0.92, extend="max")
        of = "image token" if alike else "hundredth of the image"
        bar.set_label(f"% of the attention,\nper {of}", fontsize=7)
        bar.ax.tick_params(labelsize=7)
        bar.solids.set_alpha(1)
        bar.outline.set_visible(False)
        figure.supxlabel(caption, fontsize=8)
        return png_of(figure)


def _upsampled(values: Any, box: tuple[float, float, float, float], size: tuple[int, int]) -> Any:
    """Values (rows, columns) of the box, bicubic, over the whole photo; 0 where the model is not shown it."""
    left, top, right, bottom = box
    side = max(round(right - left), 1), max(round(bottom - top), 1)
    covered = np.asarray(Image.fromarray(values).resize(side, Image.Resampling.BICUBIC)).clip(0)
    canvas = np.zeros((size[1], size[0]), np.float32)
    x, y = round(left), round(top)
    inside = canvas[max(y, 0) : y + side[1], max(x, 0) : x + side[0]]
    inside[:] = covered[max(-y, 0) :, max(-x, 0) :][: inside.shape[0], : inside.shape[1]]
    return canvas


def figure_of(width: float, height: float) -> Any:
    """An empty figure that no window system and no global state knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png_of(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same figures give the same bytes
    return buffer.getvalue()
