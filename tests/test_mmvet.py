"""MM-Vet: the file the official evaluator takes, and its grades added up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from told_bundle import load_told, touch

from vlmpeft.errors import EvalError, run_command
from vlmpeft.eval import mmvet

CAPABILITIES = {"v1_0": ["ocr", "math"], "v1_1": ["rec"], "v1_2": ["math", "ocr"], "v1_3": ["rec", "ocr"]}
GRADES = {"v1_0": {"score": [1.0, 0.5]}, "v1_1": {"score": [0.0, 0.0]}, "v1_2": {"score": [0.5, 0.5]}}
GRADES |= {"v1_3": {"model": ["gpt-4-0613"] * 2, "content": ["0.2", "0.4"], "score": [0.2, 0.4]}}


def official(folder: Path) -> Path:
    """mm-vet.json of four questions."""
    questions = {
        number: {"imagename": f"{number}.png", "question": f"What is {number}?", "answer": "x", "capability": names}
        for number, names in CAPABILITIES.items()
    }
    (folder / "mm-vet.json").write_text(json.dumps(questions))
    return folder / "mm-vet.json"


@pytest.fixture
def questions(tmp_path: Path) -> list[dict[str, Any]]:
    return mmvet.read_questions(str(official(tmp_path)))


def test_total_is_a_hundred_times_the_mean_and_capabilities_share_questions(questions: list[dict[str, Any]]) -> None:
    metrics = mmvet.score(questions, GRADES)
    assert metrics["total"] == pytest.approx(100 * (0.75 + 0 + 0.5 + 0.3) / 4)
    assert metrics["std"] == pytest.approx(100 * abs(1.7 / 4 - 1.4 / 4) / 2)  # of the totals of the two runs
    assert (metrics["n"], metrics["runs"]) == (4, 2)
    assert {name: (m["total"], m["n"]) for name, m in metrics["capabilities"].items()} == {
        "math": (pytest.approx(62.5), 2),
        "ocr": (pytest.approx(100 * 1.55 / 3), 3),
        "rec": (pytest.approx(15), 2),
    }
    assert {name: (m["total"], m["n"]) for name, m in metrics["combinations"].items()} == {
        "math+ocr": (pytest.approx(62.5), 2),  # the order of the names does not matter
        "rec": (0.0, 1),
        "ocr+rec": (pytest.approx(30), 1),
    }
    low, high = metrics["total_ci95"]
    assert 0 <= low < metrics["total"] < high <= 100


def test_answers_are_exported_by_official_id(questions: list[dict[str, Any]]) -> None:
    answers = [{"question_id": f"v1_{i}", "text": f"It is {i}."} for i in (2, 0, 3, 1)]
    expected = {f"v1_{i}": f"It is {i}." for i in range(4)}
    assert mmvet.official_results(questions, answers) == expected
    numbered = [{**q, "question_id": i} for i, q in enumerate(questions)]  # LLaVA numbers them
    assert mmvet.official_results(numbered, [{**a, "question_id": a["question_id"][3:]} for a in answers]) == expected
    assert mmvet.score(numbered, GRADES) == mmvet.score(questions, GRADES)


def test_missing_extra_and_repeated_ids_are_refused(questions: list[dict[str, Any]]) -> None:
    with pytest.raises(EvalError, match=r"V601.*missing answers: v1_1.*extra answers: v1_9"):
        mmvet.score(questions, {**{k: v for k, v in GRADES.items() if k != "v1_1"}, "v1_9": {"score": [1, 1]}})
    answers = [{"question_id": f"v1_{i}", "text": ""} for i in (0, 1, 2, 2)]
    with pytest.raises(EvalError, match=r"V601.*missing answers: v1_3.*repeated answers: v1_2"):
        mmvet.official_results(questions, answers)


@pytest.mark.parametrize("grade", [0.5, {}, {"score": 0.5}, {"score": []}, {"score": [1.1]}, {"score": [True]}])
def test_grade_that_is_no_list_of_shares_is_refused(grade: object, questions: list[dict[str, Any]]) -> None:
    with pytest.raises(EvalError, match=r"V602.*grade v1_0: score must be a list of numbers from 0 to 1"):
        mmvet.score(questions, {**GRADES, "v1_0": grade})


def test_unequal_numbers_of_runs_and_missing_capabilities_are_refused(questions: list[dict[str, Any]]) -> None:
    with pytest.raises(EvalError, match=r"V602.*the grades have \[1, 2\] runs"):
        mmvet.score(questions, {**GRADES, "v1_0": {"score": [1.0]}})
    with pytest.raises(EvalError, match=r"V602.*question v1_0: capability must be a list of names"):
        mmvet.score([{**questions[0], "capability": "ocr"}, *questions[1:]], GRADES)


@pytest.mark.parametrize("content", ["[]", '{"v1_0": {"question": "?"}}', "not json"])
def test_file_of_another_layout_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(EvalError, match=r"V602"):
        mmvet.read_questions(str(tmp_path / "q.json"))


def test_commands_run_a_model_export_answers_and_add_up_grades(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = official(tmp_path), tmp_path / "out"
    images = touch(tmp_path / "images", *(f"{number}.png" for number in CAPABILITIES))
    bundle = load_told(monkeypatch, {f"v1_{i}": f"It is {i}." for i in range(4)})
    assert run_command(mmvet.main, ["model=M", f"questions={file}", f"images={images}", f"out={out}"]) == 0
    assert bundle.requests[0].prompt == "What is v1_0?"  # no suffix
    expected = {f"v1_{i}": f"It is {i}." for i in range(4)}
    assert json.loads((out / "results.json").read_text()) == expected
    assert json.loads((out / "metrics.json").read_text())["max_new_tokens"] == 1024
    again = tmp_path / "again.json"
    assert run_command(mmvet.main, [f"questions={file}", f"answers={out / 'answers.jsonl'}", f"results={again}"]) == 0
    assert json.loads(again.read_text()) == expected
    (tmp_path / "grades.json").write_text(json.dumps(GRADES))
    capsys.readouterr()
    assert run_command(mmvet.main, [f"questions={file}", f"grades={tmp_path / 'grades.json'}"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == pytest.approx(38.75)


def test_grades_that_are_no_object_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grades.json").write_text("[]")
    assert run_command(mmvet.main, [f"questions={official(tmp_path)}", f"grades={tmp_path / 'grades.json'}"]) == 8
    assert "expected an object, id to grade" in capsys.readouterr().err
