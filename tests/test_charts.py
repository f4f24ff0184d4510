"""Charts: ticks are nice and cover the range, scales are monotone, points are thinned and stay inside the picture."""

from __future__ import annotations

import itertools
import math
import random
import xml.etree.ElementTree as ET

import pytest

from vlmpeft.charts import LIMIT, Scale, Series, drawable, line_chart, log_ticks, number, smooth, thin, ticks

SVG = "{http://www.w3.org/2000/svg}"


def parse(chart: str) -> ET.Element:
    """The chart as XML; a tag left open or a bare `<` raises."""
    return ET.fromstring(chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def places(chart: str) -> list[list[tuple[float, float]]]:
    """The pixel coordinates of every polyline."""
    lines = parse(chart).findall(f"{SVG}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in lines]  # type: ignore[misc]


RANGES = [
    (0, 1),
    (0, 2180),
    (0.487, 9.93),
    (-3, 7),
    (1e-7, 4e-4),
    (99.99, 100.01),
    (-5e9, -1e3),
    (5, 5),
    (0, 0),
    (-2, -2),
]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_ticks_cover_the_range_in_equal_nice_steps(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 3 <= len(marks) <= 8
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-4


@pytest.mark.parametrize(("low", "high"), [(1e-6, 3e-3), (2, 2), (1, 1), (0.3, 40), (1e-12, 1e12), (9, 11)])
def test_log_ticks_cover_the_range_with_powers_of_ten(low: float, high: float) -> None:
    marks = log_ticks(low, high)
    assert marks[0] <= low * (1 + 1e-9)
    assert marks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(marks) <= 9
    assert marks == sorted(set(marks))
    for mark in marks:
        assert round(mark / 10 ** math.floor(math.log10(mark) + 1e-9), 6) in (1, 2, 5)


def test_scale_is_monotone_and_maps_its_ends_exactly() -> None:
    for log in (False, True):
        scale = Scale(0.5, 80, 300, 20, log)
        pixels = [scale(v) for v in (0.5, 1, 2, 5, 20, 79, 80)]
        assert pixels == sorted(pixels, reverse=True)
        assert pixels[0] == pytest.approx(300)
        assert pixels[-1] == pytest.approx(20)
    assert Scale(1, 100, 0, 10, True)(10) == pytest.approx(5)


def test_higher_values_are_drawn_higher() -> None:
    for log in (False, True):
        (line,) = places(line_chart("t", [Series("a", [(i, 1.5**i) for i in range(20)])], "x", "y", log=log))
        heights = [y for _, y in line]
        assert heights == sorted(heights, reverse=True)
        assert heights[0] > heights[-1]


def test_thinning_keeps_ends_order_and_extremes() -> None:
    rng = random.Random(0)
    points = [(float(i), rng.gauss(0, 1)) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[12_345] = (12_345.0, -99.0)
    kept = thin(points)
    assert len(kept) <= LIMIT
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert points[54_321] in kept
    assert points[12_345] in kept
    assert thin(points[:LIMIT]) == points[:LIMIT]


def test_a_hundred_thousand_points_stay_inside_the_view_box_and_under_the_limit() -> None:
    rng = random.Random(1)
    points = [(float(i), rng.lognormvariate(0, 2)) for i in range(100_000)]
    chart = line_chart(
        "t", [Series("raw", points, "raw"), Series("mean", smooth(points, 99))], "x", "y", width=400, height=250
    )
    for line in places(chart):
        assert len(line) <= LIMIT
        assert all(0 <= x <= 400 and 0 <= y <= 250 for x, y in line)


def test_points_that_are_not_finite_are_left_out() -> None:
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0), (math.nan, 1.0)]
    (line,) = places(line_chart("t", [Series("a", points)], "x", "y"))
    assert len(line) == 2
    assert drawable([(1, 0.0), (2, -1.0), (3, 4.0)], log=True) == [(3, 4.0)]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("points", [[(7, 3.0)], [(0, 2.0), (1, 2.0), (2, 2.0)], [(5, 1e-9), (6, 1e9)]])
def test_one_point_and_constant_values_are_drawn(points: list[tuple[float, float]], log: bool) -> None:
    chart = line_chart("t", [Series("a", points)], "x", "y", log=log)
    root = parse(chart)
    assert "nan" not in chart
    assert "inf" not in chart
    assert len(places(chart)[0]) == len(points)
    assert root.findall(f"{SVG}circle")


@pytest.mark.parametrize("points", [[], [(0, math.nan)]])
def test_nothing_to_draw_is_said_in_a_line(points: list[tuple[float, float]]) -> None:
    chart = line_chart("Loss <1>", [Series("a", points)], "x", "y")
    assert "no finite values" in chart
    assert "<svg" not in chart
    assert "&lt;1&gt;" in chart


def test_chart_has_title_description_labels_and_legend_escaped() -> None:
    series = [Series("<b>lora</b>", [(0, 1.0), (9, 2.0)]), Series("projector", [(0, 3.0), (9, 4.0)], "dots", 1)]
    chart = line_chart("Loss & more", series, "optimiser step", "nats", marks=[(5, "best")])
    root = parse(chart)
    assert root[0].tag == f"{SVG}title"
    assert root[0].text == "Loss & more"
    assert root[1].tag == f"{SVG}desc"
    assert "from 1 to 2" in str(root[1].text)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"optimiser step", "nats", "<b>lora</b>", "projector", "best"} <= set(texts)
    dashes = [line.attrib["stroke-dasharray"] for line in root.findall(f"{SVG}polyline")]
    assert len(set(dashes)) == 2  # told apart without colour


def test_step_axis_has_whole_numbers_only() -> None:
    root = parse(line_chart("t", [Series("a", [(1, 1.0), (2, 2.0), (3, 4.0)])], "step", "y"))
    foot = [t.text for t in root.iter(f"{SVG}text") if t.attrib.get("text-anchor") == "middle"]
    assert foot == ["1", "2", "3", "step", "y"]


def test_smoothing_keeps_a_straight_line_and_calms_noise() -> None:
    line = [(float(i), 2.0 * i) for i in range(50)]
    middle = [y for _, y in smooth(line, 9)][10:40]
    assert middle == pytest.approx([2.0 * i for i in range(10, 40)])
    rng = random.Random(2)
    noise = [(float(i), rng.gauss(0, 1)) for i in range(1000)]
    assert max(abs(y) for _, y in smooth(noise, 61)[60:-60]) < 0.6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (12500, "12.5k"),
        (7.06e9, "7.06B"),
        (4e-4, "4e-4"),
        (-1500, "-1.5k"),
        (2.5e-7, "2.5e-7"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_labels_of_a_log_scale_below_a_thousandth_are_all_powers() -> None:
    texts = [
        t.text
        for t in parse(line_chart("Rate", [Series("a", [(0, 1e-5), (9, 1e-3)])], "x", "y", log=True)).iter(f"{SVG}text")
    ]
    assert {"1e-5", "1e-4", "1e-3"} <= set(texts)
    assert "0.001" not in texts
