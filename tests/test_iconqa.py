"""IconQA: text choices and blanks, each by its own rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_bundle import FakeBundle
from PIL import Image

import vlmpeft
from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import iconqa

PROBLEMS: dict[str, dict[str, Any]] = {
    "1": {"question": "What comes next?", "choices": ["star", "moon"], "answer": 1, "grade": "prek"},
    "2": {"question": "Which is more?", "choices": ["3", "4", "5"], "answer": "0", "grade": "grade1"},
    "3": {"question": "Count them.", "answer": "7", "grade": "grade1"},
    "4": {"question": "What time is it?", "answer": "3:30", "grade": "grade2"},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "iconqa_data"
    for task, pids in {"choose_txt": "12", "fill_in_blank": "34"}.items():
        for pid in pids:
            (folder / "iconqa" / "test" / task / pid).mkdir(parents=True)
            Image.new("RGB", (3, 3)).save(folder / "iconqa" / "test" / task / pid / "image.png")
    (folder / "problems.json").write_text(json.dumps(PROBLEMS))
    splits = {"choose_txt_test": [1, 2], "fill_in_blank_test": [3, 4]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


def scored(data: Path, said: dict[str, str], capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    answers = data.parent / "answers.json"
    answers.write_text(json.dumps([{"question_id": int(key), "text": text} for key, text in said.items()]))
    assert run_command(iconqa.main, [f"data={data}", f"answers={answers}", *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("said", "parser", "correct", "unparsable"),
    [
        ({"2": "A", "1": "B"}, "official", 2, 0),
        ({"2": "A. 3", "1": "The answer is B."}, "official", 2, 0),
        ({"2": "It is A", "1": "moon"}, "official", 0, 2),
        ({"2": "It is A", "1": "moon"}, "lenient", 2, 0),
        ({"2": "A.", "1": "It is B"}, "strict", 1, 1),
    ],
)
def test_choices_are_read_by_the_named_parser(
    said: dict[str, str], parser: str, correct: int, unparsable: int, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = scored(data, said, capsys, f"parser={parser}")
    assert (metrics["correct"], metrics["n"], metrics["unparsable"]) == (correct, 2, unparsable)
    assert (metrics["task"], metrics["parser"]) == ("text", parser)


@pytest.mark.parametrize(
    ("said", "parser", "correct"),
    [
        ({"4": "3:30", "3": "7"}, "official", 2),
        ({"4": "3:30.", "3": "Seven"}, "official", 0),
        ({"4": "3:30.", "3": "Seven"}, "lenient", 2),
        ({"4": "It is 3:30", "3": "77"}, "lenient", 0),
        ({"4": "3:30.", "3": "7"}, "strict", 1),
    ],
)
def test_blanks_have_to_equal_the_answer(
    said: dict[str, str], parser: str, correct: int, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scored(data, said, capsys, "task=blank", f"parser={parser}")["correct"] == correct


def test_empty_blank_is_unparsable_and_wrong(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = scored(data, {"4": "", "3": "7"}, capsys, "task=blank")
    assert (metrics["correct"], metrics["unparsable"], metrics["empty"]) == (1, 1, 1)
    assert {name: m["accuracy"] for name, m in metrics["grades"].items()} == {"grade1": 1.0, "grade2": 0.0}


def read(data: Path, **changes: str) -> list[Any]:
    return iconqa.read_items({"data": str(data), **iconqa.BENCHMARK.defaults, **changes}, True)


def test_prompts_ask_for_a_letter_or_a_word(data: Path) -> None:
    assert read(data)[0].prompt == (
        "What comes next?\nA. star\nB. moon\nAnswer with the option's letter from the given choices directly."
    )
    assert read(data, task="blank")[0].prompt == "Count them.\nAnswer the question using a single word or phrase."


def test_unknown_task_split_and_answer_are_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="task=img: no such task"):
        read(data, task="img")
    with pytest.raises(ConfigError, match="split=choose_txt_tset: no such split"):
        read(data, split="tset")
    for answer in (2, "B", None):
        (data / "problems.json").write_text(json.dumps({**PROBLEMS, "1": {**PROBLEMS["1"], "answer": answer}}))
        with pytest.raises(EvalError, match="question 1: answer must be an index"):
            read(data)
    (data / "problems.json").write_text(json.dumps({"1": PROBLEMS["1"]}))
    with pytest.raises(EvalError, match="1 ids of choose_txt_test are no problems; the first is 2"):
        read(data)


@pytest.mark.parametrize(("task", "says"), [("text", {"Which": "A", "What": "B"}), ("blank", {"C": "7", "W": "3:30"})])
def test_command_asks_a_model(
    task: str, says: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = FakeBundle(says)
    monkeypatch.setattr(vlmpeft, "load", lambda model, device: bundle)
    assert run_command(iconqa.main, ["model=m", f"data={data}", f"out={tmp_path / 'out'}", f"task={task}"]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["accuracy"] == 1.0
    assert [len(files) for files in bundle.files] == [1, 1]
