"""MMBench: rotations of the options, a question right in all of them, VLMEvalKit's exact matching."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fake_bundle import FakeBundle
from PIL import Image

import vlmpeft
from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import mmbench
from vlmpeft.eval.choices import parse_vlmevalkit

FOUR = {"A": "red", "B": "green", "C": "blue", "D": "dark blue"}
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category")


@pytest.mark.parametrize(
    ("text", "letter", "rule"),
    [
        ("B", "B", "the only token"),
        ("B.", "B", "a stop is a space"),
        ("(B)", "B", "brackets are spaces"),
        ("**B**", "B", "stars are spaces"),
        ("\\boxed{B}", "B", "braces are spaces"),
        ("B: green", "B", "a colon is a space"),
        ("I choose B", "B", "among the last tokens"),
        ("B is my choice", "B", "the first of four tokens"),
        ("B is what I say", None, "the first of five is too far from the end"),
        ("The answer is B because of the light that falls", "B", "by the phrase, wherever it stands"),
        ("answer is **c** as I said in all of this", "C", "the phrase in either case, starred"),
        ("A or B", None, "two letters"),
        ("b", None, "tokens count in capitals"),
        ("green", "B", "the only option text"),
        ("It is GREEN", "B", "in either case"),
        ("blue", "C", "dark blue is not in it"),
        ("dark blue", None, "blue is in it too"),
        ("it is green, I am quite sure of that, believe me", None, "more than twice the length of all options"),
        ("E", None, "no option"),
        ("Z", None, "the letter for none"),
        ("Cannot determine the answer, B", None, "a refusal"),
        ("", None, "empty"),
    ],
)
def test_parser_follows_vlmevalkits_rules(text: str, letter: str | None, rule: str) -> None:
    assert parse_vlmevalkit(text, FOUR) == letter, rule


def picture(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def row(index: int, **changes: Any) -> dict[str, Any]:
    own = {"index": index, "question": f"Question {index}?", "hint": "", "A": "cat", "B": "dog", "C": "cow", "D": ""}
    return {**own, "answer": "A", "category": "animals", "image": picture("red"), "l2-category": "seeing", **changes}


ROWS = [row(3), row(8, hint="A hint.", answer="C", category="other"), row(9, C="", answer="B", image="3")]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save(tmp_path / "dev.tsv", ROWS)


def read(data: Path, images: bool = True, **changes: str) -> list[Any]:
    return mmbench.read_items({"data": str(data), **mmbench.BENCHMARK.defaults, **changes}, images)


def test_vanilla_asks_each_question_once_with_hint_and_options(data: Path) -> None:
    items = read(data, mode="vanilla")
    assert [item.id for item in items] == ["3", "8", "9"]
    assert items[1].prompt == (
        "A hint.\nQuestion 8?\nA. cat\nB. dog\nC. cow\nAnswer with the option's letter from the given choices directly."
    )
    assert items[2].images == items[0].images  # a short image cell is the index of the row that holds it


def test_circular_asks_every_rotation_and_the_right_letter_moves_along(data: Path) -> None:
    items = read(data)
    assert [item.id for item in items] == ["3", "1000003", "2000003", "8", "1000008", "2000008", "9", "1000009"]
    assert [list(item.options.values()) for item in items[:3]] == [
        ["cat", "dog", "cow"], ["dog", "cow", "cat"], ["cow", "cat", "dog"],
    ]  # fmt: skip
    assert [item.answer for item in items] == ["A", "C", "B", "C", "B", "A", "B", "A"]
    assert [item.options[item.answer] for item in items] == ["cat"] * 3 + ["cow"] * 3 + ["dog"] * 2
    assert items[4].prompt.startswith("A hint.\nQuestion 8?\nA. dog\nB. cow\nC. cat\nAnswer")


def test_rotations_that_the_file_holds_are_taken_from_it(tmp_path: Path) -> None:
    rows = [row(3), row(1_000_003, A="dog", B="cow", C="cat", answer="C", image="3")]
    data = save(tmp_path / "rounds.tsv", rows)
    assert [item.id for item in read(data)] == ["3", "1000003"]
    assert [item.id for item in read(data, mode="vanilla")] == ["3"]
    with pytest.raises(EvalError, match=r"1 rotations have no unrotated row; the first is 1000004"):
        read(save(tmp_path / "orphan.tsv", [row(3), row(1_000_004)]))


def scored(data: Path, tmp_path: Path, said: dict[str, str], capsys: Any, *more: str) -> dict[str, Any]:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(said))
    assert run_command(mmbench.main, [f"data={data}", f"answers={answers}", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_question_is_right_if_it_is_right_in_every_rotation(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    always_a = {item.id: "A" for item in read(data, images=False)}
    metrics = scored(data, tmp_path, always_a, capsys)
    assert (metrics["correct"], metrics["n"], metrics["judged"]) == (0, 3, 8)
    assert metrics["vanilla"] == pytest.approx(1 / 3)
    knowing = {item.id: item.answer for item in read(data, images=False)}
    metrics = scored(data, tmp_path, {**knowing, "1000008": "?"}, capsys)
    assert (metrics["correct"], metrics["unparsable"], metrics["vanilla"]) == (2, 1, 1.0)
    assert {name: m["accuracy"] for name, m in metrics["categories"].items()} == {"animals": 1.0, "other": 0.0}


def test_vanilla_scores_the_unrotated_answers_and_refuses_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = scored(data, tmp_path, {"9": "B", "3": "A", "8": "A"}, capsys, "mode=vanilla")
    assert (metrics["correct"], metrics["n"], metrics["accuracy"]) == (2, 3, pytest.approx(2 / 3))
    assert run_command(mmbench.main, [f"data={data}", f"answers={tmp_path / 'answers.json'}"]) == 8
    assert "5 missing answers: 1000003" in capsys.readouterr().err


def test_hidden_answers_of_the_test_file_give_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save(tmp_path / "test.tsv", [{**r, "answer": ""} for r in ROWS])
    metrics = scored(data, tmp_path, {item.id: "A" for item in read(data, images=False)}, capsys)
    assert metrics["answers"] == "hidden"
    assert "accuracy" not in metrics


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"index": "x"}, "whole number"), ({"answer": "D"}, "none of A, B, C"), ({"image": "!" * 80}, "no base64"),
     ({"B": "nan", "answer": "A"}, "1 options"), ({"image": ""}, "no base64")],
)  # fmt: skip
def test_bad_row_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=says):
        read(save(tmp_path / "bad.tsv", [{**row(3), **changes}]))


def test_unknown_mode_missing_file_and_other_columns_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mode=round: no such mode"):
        read(data, mode="round")
    with pytest.raises(ConfigError, match="no file"):
        read(tmp_path / "absent.tsv")
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(EvalError, match="no column index, question, A, B"):
        read(tmp_path / "other.tsv")


def test_command_asks_a_model_and_the_rotations_share_one_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = FakeBundle(default="A")
    monkeypatch.setattr(vlmpeft, "load", lambda model, device: bundle)
    assert run_command(mmbench.main, ["model=m", f"data={data}", f"out={tmp_path / 'out'}"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["accuracy"], metrics["judged"], metrics["mode"]) == (0.0, 8, "circular")
    assert len({file for files in bundle.files for file in files}) == 1
    assert bundle.shown[0] == [((60, 40), (255, 0, 0))]


def test_csv_limit_of_the_process_is_left_as_it_was(data: Path) -> None:
    before = csv.field_size_limit()
    read(data)
    assert csv.field_size_limit() == before
