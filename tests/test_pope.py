"""POPE's metrics: closed forms, hand-worked cases, order, and the area under the curve."""

from __future__ import annotations

import random

import pytest
from pope_rows import TEN, refused, rows

from vlmpeft.eval import pope


def test_metrics_of_ten_questions_equal_those_worked_out_by_hand() -> None:
    metrics = pope.score(*TEN)
    assert {k: metrics[k] for k in ("tp", "fp", "tn", "fn", "n")} == {"tp": 3, "fp": 1, "tn": 4, "fn": 2, "n": 10}
    assert metrics["accuracy"] == pytest.approx(7 / 10)
    assert metrics["precision"] == pytest.approx(3 / 4)
    assert metrics["recall"] == pytest.approx(3 / 5)
    assert metrics["f1"] == pytest.approx(2 / 3)  # 2 * 0.75 * 0.6 / 1.35
    assert metrics["yes_ratio"] == pytest.approx(4 / 10)  # of the predictions; 0.5 would be of the labels
    assert (metrics["unparsable"], metrics["empty"]) == (2, 1)  # "" and "isn't", both counted as yes
    assert "auc" not in metrics


def test_metrics_agree_with_closed_forms_on_random_confusions() -> None:
    draw = random.Random(1)
    for _ in range(200):
        n = draw.randrange(1, 30)
        truth = [draw.random() < 0.5 for _ in range(n)]
        said = [draw.random() < 0.5 for _ in range(n)]
        metrics = pope.score(*rows("".join("ny"[t] for t in truth), [["No", "Yes"][s] for s in said]))
        both, either = sum(t and s for t, s in zip(truth, said, strict=True)), sum(truth) + sum(said)
        assert metrics["accuracy"] == pytest.approx(1 - sum(t ^ s for t, s in zip(truth, said, strict=True)) / n)
        assert metrics["f1"] == pytest.approx(2 * both / either if either else 0.0)  # Dice coefficient
        assert metrics["precision"] * sum(said) == pytest.approx(both)
        assert metrics["recall"] * sum(truth) == pytest.approx(both)
        assert metrics["yes_ratio"] * n == pytest.approx(sum(said))


def test_always_yes_on_a_balanced_file_scores_two_thirds_f1() -> None:
    metrics = pope.score(*rows("yn" * 1500, ["Yes"] * 3000))
    assert (metrics["accuracy"], metrics["recall"], metrics["yes_ratio"]) == (0.5, 1.0, 1.0)
    assert metrics["f1"] == pytest.approx(0.6667, abs=1e-4)


@pytest.mark.parametrize(("labels", "text"), [("yn", "No"), ("nn", "Yes"), ("nn", "No"), ("yy", "No")])
def test_division_by_zero_gives_zero_where_the_official_script_crashes(labels: str, text: str) -> None:
    metrics = pope.score(*rows(labels, [text, text]))
    assert (metrics["f1"], metrics["precision"], metrics["recall"]) == (0.0, 0.0, 0.0)
    said = "y" if text == "Yes" else "n"
    counts = {"tp": 0, "fp": labels.count("n") * (said == "y"), "tn": labels.count("n") * (said == "n")}
    assert metrics.items() >= {**counts, "fn": labels.count("y") * (said == "n"), "n": 2}.items()


def test_no_questions_at_all_give_zeros() -> None:
    metrics = pope.score([], [])
    assert metrics["n"] == 0
    assert metrics["accuracy"] == metrics["f1"] == metrics["yes_ratio"] == 0.0


def test_junk_counts_as_yes_in_precision_and_recall_too() -> None:
    metrics = pope.score(*rows("yn", ["banana", "banana"]))
    assert (metrics["tp"], metrics["fp"], metrics["unparsable"]) == (1, 1, 2)


def test_order_of_answers_and_of_questions_does_not_change_the_score() -> None:
    questions, answers = TEN
    expected = pope.score(questions, answers)
    for seed in range(20):
        draw = random.Random(seed)
        assert pope.score(draw.sample(questions, 10), draw.sample(answers, 10)) == expected


def test_official_field_name_answer_and_text_ids_are_accepted() -> None:
    questions, answers = TEN
    renamed = [{"question_id": str(a["question_id"]), "answer": a["text"]} for a in answers]
    assert pope.score(questions, renamed) == pope.score(questions, answers)


def every_pair(margins: list[float], labels: list[bool]) -> float:
    """The definition: the share of (yes, no) pairs in which the yes has the larger margin, ties half."""
    yes = [m for m, label in zip(margins, labels, strict=True) if label]
    no = [m for m, label in zip(margins, labels, strict=True) if not label]
    return sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no)) if yes and no else 0.0


def test_auc_equals_the_count_over_all_pairs_with_and_without_ties() -> None:
    draw = random.Random(2)
    for _ in range(300):
        n = draw.randrange(1, 40)
        margins = [draw.choice([draw.gauss(0, 1), float(draw.randrange(-2, 3))]) for _ in range(n)]
        labels = [draw.random() < 0.4 for _ in range(n)]
        assert pope.auc(margins, labels) == pytest.approx(every_pair(margins, labels))


def test_auc_is_one_for_a_perfect_half_for_a_constant_and_zero_for_an_inverted_ranking() -> None:
    labels = [True, True, False, False, False]
    assert pope.auc([2.0, 1.0, 0.0, -1.0, -2.0], labels) == 1.0
    assert pope.auc([0.0] * 5, labels) == 0.5
    assert pope.auc([-2.0, -1.0, 0.0, 1.0, 2.0], labels) == 0.0
    assert pope.auc([1.0, 2.0], [True, True]) == 0.0  # nothing to compare with


def test_auc_is_reported_when_every_answer_has_a_margin() -> None:
    questions, answers = rows("ynyn", ["Yes", "No", "No", "Yes"])
    margins = [{**a, "margin": m} for a, m in zip(answers, [2.0, -1, 0.5, 0.5], strict=True)]
    assert pope.score(questions, margins)["auc"] == pytest.approx(3.5 / 4)
    assert pope.score(questions, margins[::-1])["auc"] == pytest.approx(3.5 / 4)
    assert "auc" not in pope.score(questions, [*margins[:3], {**margins[3], "margin": None}])
    assert "margin must be a number" in refused(
        questions, [{**margins[0], "margin": float("nan")}, *margins[1:]], "V602"
    )
