"""Statistics of a comparison, against closed forms and sums written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmpeft.compare_stats import Answered, confidence, interval, is_right, mean_accuracy, paired, spread
from vlmpeft.eval.interval import interval as binomial_interval


def answered(right: str, seed: int = 0, per_image: int = 1) -> Answered:
    """Answers as a text of 1 and 0, so many of them about each image."""
    numbers = range(len(right))
    return Answered(
        seed, [f"q{i}" for i in numbers], [f"i{i // per_image}" for i in numbers], [c == "1" for c in right]
    )


def test_accuracy_and_spread_are_those_of_the_seeds() -> None:
    runs = [answered("1100", 0), answered("1110", 1), answered("1111", 2)]
    assert mean_accuracy(runs) == 9 / 12
    assert spread(runs) == pytest.approx(0.25)  # of 0.5, 0.75, 1
    assert spread(runs[:1]) is None


def test_the_difference_is_over_the_questions_both_answered() -> None:
    found = paired([answered("1101", 0), answered("0000", 7)], [answered("100", 0)])
    assert found is not None
    assert (found["difference"], found["questions"], found["images"]) == (pytest.approx(1 / 3), 3, 3)
    assert paired([answered("11", 1)], [answered("11", 2)]) is None


def test_the_interval_is_binomial_where_each_image_has_one_question() -> None:
    right = "1" * 30 + "0" * 70
    found = paired([answered(right)], [answered("0" * 100)])
    low, high = binomial_interval([float(c) for c in right])  # exact, not drawn
    assert found is not None
    assert found["low"] == pytest.approx(low, abs=0.0101)
    assert found["high"] == pytest.approx(high, abs=0.0101)


def test_questions_about_one_image_count_as_one_draw() -> None:
    once = paired([answered("1" * 12 + "0" * 28)], [answered("0" * 40)])
    tripled = paired([answered("111" * 12 + "000" * 28, per_image=3)], [answered("0" * 120, per_image=3)])
    assert once is not None
    assert tripled is not None
    assert (tripled["low"], tripled["high"]) == (once["low"], once["high"])
    assert tripled["images"] == 40


def test_an_equal_difference_in_every_image_leaves_no_doubt() -> None:
    assert interval(np.asarray([[1.0, 4.0]] * 9)) == (0.25, 0.25)


def test_seeds_and_images_may_come_in_any_order() -> None:
    runs = [answered("110010", 0, 2), answered("011011", 1, 2)]
    reference = [answered("010101", 1, 2), answered("100110", 0, 2)]
    assert paired(runs, reference) == paired(runs[::-1], reference[::-1])


@pytest.mark.parametrize(("margin", "label", "right"), [(0.1, "yes", True), (0.1, "no", False), (0.0, "no", True)])
def test_yes_is_said_where_its_logit_is_larger(margin: float, label: str, right: bool) -> None:
    assert is_right(margin, label) is right


def test_confidence_is_the_mean_probability_of_the_right_word() -> None:
    expected = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(3))) / 3
    assert confidence([2.0, -0.5, 3.0], ["yes", "no", "no"]) == pytest.approx(expected)
    assert confidence([1e6, -1e6], ["yes", "no"]) == 1
