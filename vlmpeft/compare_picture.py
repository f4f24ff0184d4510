"""The figure of a comparison: accuracy against what is trained in the language model."""

from __future__ import annotations

from collections.abc import Sequence

from vlmpeft.compare_table import Line
from vlmpeft.steering.pictures import COLOURS, MARKERS, STYLE, figure_of, png_of

BESIDE = 1.035  # of a point's place, where another arm trains as many parameters


def accuracy_figure(lines: Sequence[Line], title: str) -> bytes:
    """PNG: a point an arm with its spread over seeds, parameters of the language model on a log axis.

    Arms that train nothing there are lines across: they have no place on that axis. Of arms that train equally many,
    each stands a little to the right of the one before, or they would hide each other.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = figure_of(7.2, 4.2)
        axes = figure.subplots()
        points, across = ([line for line in lines if bool(line.language) is kind] for kind in (True, False))
        for number, line in enumerate(points):
            beside = sum(other.language == line.language for other in points[:number])
            axes.errorbar(
                line.language * BESIDE**beside, 100 * line.accuracy,
                None if line.spread is None else 100 * line.spread, color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number // len(COLOURS) % len(MARKERS)], markersize=5, linestyle="none", elinewidth=0.9,
                capsize=2, label=line.arm,
            )  # fmt: skip
        for number, line in enumerate(across):
            dash = (0, (2 + 3 * (number % 3), 2))
            axes.axhline(
                100 * line.accuracy, color=COLOURS[number % len(COLOURS)], linewidth=1, linestyle=dash, zorder=1,
                label=f"{line.arm} (none)",
            )  # fmt: skip
        trained = any(line.language for line in lines)
        if trained:
            axes.set_xscale("log")
        else:
            axes.set_xticks([])
        axes.set(title=title, ylabel="accuracy, %")
        axes.set_xlabel("parameters trained in the language model" if trained else "no arm trains the language model")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        figure.legend(loc="outside right upper", fontsize=7)
        return png_of(figure)
