"""POPE's settings together: LLaVA's published mean, one file for all settings, a question of several of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pope_rows import Rows, rows

from vlmpeft.errors import run_command
from vlmpeft.eval import pope
from vlmpeft.eval.pope_score import settings_of
from vlmpeft.eval.rows import write_rows

# setting: questions of no, tp, fp, F1 = 2 tp / (tp + fp + 1500) to four digits, where 1500 are of yes
PUBLISHED = {
    "random": (1410, 1190, 40, 0.8718),  # 2380 / 2730
    "popular": (1500, 1199, 80, 0.8629),  # 2398 / 2779
    "adversarial": (1500, 1183, 117, 0.8450),  # 2366 / 2800
}


def test_llavas_single_figure_is_the_mean_of_the_three_f1() -> None:
    """LLaVA's issue 626: .8718 (on 2910 rows), .8629, .8450 -> .8599."""
    questions: Rows = []
    answers: Rows = []
    for setting, (negatives, tp, fp, _) in PUBLISHED.items():
        said = ["Yes"] * tp + ["No"] * (1500 - tp) + ["Yes"] * fp + ["No"] * (negatives - fp)
        asked, told = rows("y" * 1500 + "n" * negatives, said)
        questions += [{**row, "setting": setting} for row in asked]
        answers += [{**row, "setting": setting} for row in told]
    metrics = pope.score_settings(questions, answers)
    assert {name: round(m["f1"], 4) for name, m in metrics["settings"].items()} == {
        name: f1 for name, (*_, f1) in PUBLISHED.items()
    }
    assert round(metrics["mean_f1"], 4) == 0.8599
    shares = [(1190 + 1370) / 2910, (1199 + 1420) / 3000, (1183 + 1383) / 3000]  # tp + tn of n
    assert metrics["mean_accuracy"] == pytest.approx(sum(shares) / 3)
    five = {"accuracy", "precision", "recall", "f1", "yes_ratio"}
    assert all(five <= m.keys() for m in metrics["settings"].values())


# A positive question is asked in all three settings; a negative one in one, or in two.
SHARED = [
    ("random,popular,adversarial", "y", "Yes"),
    ("random,popular,adversarial", "y", "No"),
    ("random", "n", "No"),
    ("random", "n", "No"),
    ("popular, adversarial", "n", "Yes"),
    ("popular", "n", "No"),
    ("adversarial", "n", "Yes"),
]


def shared() -> tuple[Rows, Rows]:
    questions, answers = rows("".join(label for _, label, _ in SHARED), [text for *_, text in SHARED])
    return [{**q, "category": row[0]} for q, row in zip(questions, SHARED, strict=True)], answers


def test_a_question_of_several_settings_counts_in_each() -> None:
    metrics = pope.score_settings(*shared())
    counts = {name: [m[key] for key in ("tp", "fp", "tn", "fn", "n")] for name, m in metrics["settings"].items()}
    assert counts == {
        "random": [1, 0, 2, 1, 4],
        "popular": [1, 1, 1, 1, 4],
        "adversarial": [1, 2, 0, 1, 4],
    }
    f1 = [2 / (2 + 0 + 1), 2 / (2 + 1 + 1), 2 / (2 + 2 + 1)]  # 2 tp / (2 tp + fp + fn)
    assert metrics["mean_f1"] == pytest.approx(sum(f1) / 3)


def test_vlmevalkits_overall_is_f1_over_the_rows_of_all_settings_together() -> None:
    metrics = pope.score_settings(*shared(), parser="vlmevalkit")
    assert metrics["n"] == 12  # of 7 questions: a row for each setting
    assert metrics["pooled_f1"] == pytest.approx(2 * 3 / (2 * 3 + 3 + 3))
    assert metrics["pooled_accuracy"] == pytest.approx((3 + 3) / 12)
    once = pope.score(*shared(), parser="vlmevalkit")  # a question once
    assert (once["n"], once["tp"], once["fp"], once["fn"]) == (7, 1, 2, 1)


def test_what_is_no_answer_counts_in_each_setting_too() -> None:
    questions, answers = shared()
    metrics = pope.score_settings(questions, [{**answers[0], "text": ""}, *answers[1:]], parser="vlmevalkit")
    assert (metrics["unparsable"], metrics["empty"]) == (3, 3)


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"setting": "coco_pope_random", "category": "popular"}, ("coco_pope_random",)),  # the file's name
        ({"category": "popular"}, ("popular",)),  # LLaVA's files
        ({"category": "adversarial,popular,random"}, ("adversarial", "popular", "random")),  # VLMEvalKit's
        ({"category": "popular,popular"}, ("popular",)),
        ({"category": "colour"}, ()),  # somebody's own: no settings of POPE's
        ({"category": "popular,colour"}, ()),
        ({"category": ""}, ()),
        ({}, ()),
    ],
)
def test_settings_are_the_files_or_popes_own(row: dict[str, str], settings: tuple[str, ...]) -> None:
    assert settings_of(row) == settings


@pytest.mark.parametrize(
    ("file", "setting", "status"),
    [
        ("coco_pope_random.json", "coco_pope_popular", 8),
        ("popular.json", "random", 8),
        ("popular.json", "coco_pope_popular", 0),
        ("popular.json", None, 0),
        ("mine.json", "random", 0),  # nobody knows what is in it
        ("popular.json", "mine", 0),
    ],
)
def test_answers_to_another_setting_are_refused_though_their_ids_are_the_same(
    file: str, setting: str | None, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, answers = rows("yn", ["Yes", "No"])
    write_rows(tmp_path / file, questions)
    write_rows(tmp_path / "a.jsonl", [{**a, **({"setting": setting} if setting else {})} for a in answers])
    assert run_command(pope.main, [f"questions={tmp_path / file}", f"answers={tmp_path / 'a.jsonl'}"]) == status
    assert (f"the answers are to the setting '{setting}'" in capsys.readouterr().err) is (status == 8)


def test_one_file_of_all_settings_is_scored_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = shared()
    write_rows(tmp_path / "all.jsonl", questions)
    write_rows(tmp_path / "a.jsonl", answers[::-1])
    assert run_command(pope.main, [f"questions={tmp_path / 'all.jsonl'}", f"answers={tmp_path / 'a.jsonl'}"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == {"benchmark": "pope", "parser": "official", **pope.score_settings(questions, answers)}
    assert list(metrics["settings"]) == ["random", "popular", "adversarial"]
