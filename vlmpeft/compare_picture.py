"""The figure of a comparison: accuracy against what is trained in the language model."""

from __future__ import annotations

from collections.abc import Sequence

from vlmpeft.compare_table import Line
from vlmpeft.steering.pictures import COLOURS, MARKERS, STYLE, figure_of, png_of


def accuracy_figure(lines: Sequence[Line], title: str) -> bytes:
    """PNG: a point an arm with its spread over seeds, parameters of the language model on a log axis.

    Arms that train nothing there are lines across: they have no place on that axis.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = figure_of(7.2, 4.2)
        axes = figure.subplots()
        for number, line in enumerate(lines):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
            accuracy = 100 * line.accuracy
            if line.language:
                axes.errorbar(
                    line.language, accuracy, None if line.spread is None else 100 * line.spread, color=colour,
                    marker=marker, markersize=5, linestyle="none", elinewidth=0.9, capsize=2, label=line.arm,
                )  # fmt: skip
            else:
                dash = (0, (2 + 3 * (number % 3), 2))
                axes.axhline(accuracy, color=colour, linewidth=1, linestyle=dash, label=f"{line.arm} (none)")
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
