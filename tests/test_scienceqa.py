"""ScienceQA-IMG: LLaVA's parser, the questions with an image, their prompt and groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_bundle import FakeBundle
from PIL import Image

import vlmpeft
from vlmpeft.errors import ConfigError, DataError, EvalError, run_command
from vlmpeft.eval import scienceqa

THREE = {"A": "cat", "B": "dog", "C": "cow"}


@pytest.mark.parametrize(
    ("text", "letter", "rule"),
    [
        ("B", "B", "exactly a letter"),
        ("D", None, "beyond the choices"),
        ("F", None, "beyond A to E"),
        ("b", None, "case counts"),
        (" B", None, "nothing is stripped"),
        ("B\n", None, "nothing is stripped"),
        ("B.", None, "letter, stop and space are three characters"),
        ("B. ", "B", "letter, stop, space"),
        ("B. dog", "B", "letter, stop, space in front"),
        ("B.dog", None, "no space"),
        ("B) dog", None, "no stop"),
        ("E. x", None, "beyond the choices"),
        ("F. x", None, "beyond A to E"),
        ("A. The answer is B.", "A", "the front comes first"),
        ("The answer is B.", "B", "once"),
        ("So: The answer is B. Good.", "B", "anywhere"),
        ("The answer is B!", "B", "any one character after it"),
        ("The answer is B", None, "nothing after it"),
        ("The answer is B\n", None, "a line feed is no character to a dot"),
        ("the answer is B.", None, "case counts"),
        ("The answer is B. The answer is C.", None, "twice"),
        ("The answer is B. The answer is B.", None, "twice, though the same"),
        ("The answer is D.", None, "beyond the choices"),
        ("The answer is Dog.", None, "D is beyond the choices"),
        ("The answer is Cow.", "C", "one character after it: an o"),
        ("The answer is (B).", None, "a bracket is no capital"),
        ("dog", None, "texts of choices are not looked for"),
        ("", None, "empty"),
    ],
)
def test_parser_follows_llavas_rules(text: str, letter: str | None, rule: str) -> None:
    assert scienceqa.parse_llava(text, THREE) == letter, rule


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("b", "B"), ("B.", "B"), ("B.dog", "B"), ("b.", None), ("The answer is B.", None), ("D", None),
     ("", None), ("AB", None), (" B", None)],
)  # fmt: skip
def test_lmms_eval_parser_takes_either_case_and_a_stop(text: str, letter: str | None) -> None:
    assert scienceqa.parse_lmms_eval(text, THREE) == letter


def problem(**changes: Any) -> dict[str, Any]:
    own = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "", "image": "image.png"}
    return {**own, "subject": "natural science", "grade": "grade3", **changes}


PROBLEMS = {
    "5": problem(),
    "7": problem(image=None),
    "9": problem(hint="Look.", choices=["x", "y", "z"], answer=0, subject="social science", grade="grade10"),
    "11": problem(question="Here: <image>?"),
    "12": problem(),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "scienceqa"
    for pid in ("5", "9", "11"):
        (folder / "images" / "test" / pid).mkdir(parents=True)
        Image.new("RGB", (3, 3)).save(folder / "images" / "test" / pid / "image.png")
    (folder / "problems.json").write_text(json.dumps(PROBLEMS))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["5", "7", "9", "11"], "train": ["12"]}))
    return folder


def read(data: Path, images: bool = True, **changes: str) -> list[Any]:
    return scienceqa.read_items({"data": str(data), **scienceqa.BENCHMARK.defaults, **changes}, images)


def test_only_questions_of_the_split_with_an_image_are_asked(data: Path) -> None:
    assert [item.id for item in read(data)] == ["5", "9", "11"]
    assert [item.answer for item in read(data)] == ["B", "A", "B"]


def test_prompt_has_the_hint_the_options_and_the_instruction(data: Path) -> None:
    first, hinted, marked = (item.prompt for item in read(data))
    assert first == "Which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert hinted.startswith("Context: Look.\nWhich?\nA. x\nB. y\nC. z\n")
    assert marked.startswith(r"Here: \<image>?")  # a mark typed in the data is text


def test_missing_image_unknown_split_and_missing_file_are_refused(data: Path, tmp_path: Path) -> None:
    (data / "images" / "test" / "9" / "image.png").unlink()
    with pytest.raises(DataError, match=r"D103.*9/image.png"):
        read(data)
    with pytest.raises(ConfigError, match=r"split=tset: no such split.*did you mean 'test'"):
        read(data, split="tset")
    with pytest.raises(ConfigError, match=r"no file .*problems\.json"):
        read(tmp_path)


@pytest.mark.parametrize("changes", [{"answer": 2}, {"answer": "B"}, {"choices": ["one"], "answer": 0}])
def test_problem_without_a_right_choice_is_refused(changes: dict[str, Any], data: Path) -> None:
    (data / "problems.json").write_text(json.dumps({**PROBLEMS, "5": problem(**changes)}))
    with pytest.raises(EvalError, match=r"V602.*question 5"):
        read(data, images=False)


def test_given_answers_are_scored_by_id_wrong_ones_and_unparsable_ones_alike(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"11": "dog", "9": "A. x", "5": "A"}  # unparsable, right, wrong
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"question_id": k, "text": t}) + "\n" for k, t in said.items()))
    assert run_command(scienceqa.main, [f"data={data}", f"answers={answers}"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["benchmark"], metrics["parser"]) == ("scienceqa-img", "official")
    assert (metrics["correct"], metrics["n"], metrics["unparsable"], metrics["by_chance"]) == (1, 3, 1, 0)
    assert {name: m["accuracy"] for name, m in metrics["grades"].items()} == {"1-6": 0.0, "7-12": 1.0}
    answers.write_text('{"question_id": "5", "text": "A"}\n')
    assert run_command(scienceqa.main, [f"data={data}", f"answers={answers}"]) == 8
    assert "2 missing answers: 9, 11" in capsys.readouterr().err


def test_command_asks_a_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = FakeBundle({"Look.": "A"}, default="B")
    monkeypatch.setattr(vlmpeft, "load", lambda model, device: bundle)
    assert run_command(scienceqa.main, ["model=m", f"data={data}", f"out={tmp_path / 'out'}"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["accuracy"], metrics["split"], metrics["model"]) == (1.0, "test", "m")
    assert [len(files) for files in bundle.files] == [1, 1, 1]
