"""GQA: exact match under three named rules, both question layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from told_bundle import load_told, touch

from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import gqa
from vlmpeft.eval.rows import write_rows


@pytest.mark.parametrize(
    ("text", "official", "lmms_eval", "strict"),
    [
        ("dog", True, True, True),
        ("Dog", True, True, False),
        ("dog.", True, True, False),
        ("DOG...", True, True, False),  # every full stop at the end
        ("dog!", False, True, False),  # only lmms-eval drops other marks
        ("(dog)", False, True, False),
        ("a dog", False, False, False),  # no article rule
        ("dogs", False, False, False),
        ("dog. ", False, False, False),  # nothing is stripped: a space after the stop keeps it
        ("", False, False, False),
        ("puppy dog", False, False, False),
    ],
)
def test_answer_must_be_the_label_exactly(text: str, official: bool, lmms_eval: bool, strict: bool) -> None:
    for parser, expected in {"official": official, "lmms-eval": lmms_eval, "strict": strict}.items():
        question = {"question_id": 1, "text": "?", "label": "dog"}
        assert gqa.score([question], [{"question_id": 1, "text": text}], parser=parser)["accuracy"] == expected, parser


def test_accuracy_is_given_per_category_and_in_all() -> None:
    kinds = ["query", "query", "verify", "choose"]
    questions = [{"question_id": i, "text": "?", "label": "red", "category": kind} for i, kind in enumerate(kinds)]
    answers = [{"question_id": i, "text": text} for i, text in enumerate(["red", "blue", "Red", ""])][::-1]
    metrics = gqa.score(questions, answers)
    assert (metrics["accuracy"], metrics["n"], metrics["empty"]) == (0.5, 4, 1)
    found = {name: (m["accuracy"], m["n"]) for name, m in metrics["categories"].items()}
    assert found == {"choose": (0.0, 1), "query": (0.5, 2), "verify": (1.0, 1)}


def test_official_file_is_read_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = {"imageId": "n1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}}
    (tmp_path / "testdev.json").write_text(
        json.dumps({"201": question, "202": {**question, "question": "Is it blue?", "answer": "no"}})
    )
    bundle = load_told(monkeypatch, {"": "Yes."})
    images = touch(tmp_path / "images", "n1.jpg")
    paths = [f"questions={tmp_path / 'testdev.json'}", f"images={images}", f"out={tmp_path / 'out'}"]
    assert run_command(gqa.main, ["model=M", *paths]) == 0
    assert [r.images for r in bundle.requests] == [((images / "n1.jpg").resolve(),)] * 2
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["accuracy"], metrics["parser"]) == (0.5, "official")
    assert metrics["categories"]["verify"]["n"] == 2


@pytest.mark.parametrize("content", ["[]", '{"1": {"question": "?"}}', "{", "3"])
def test_file_of_another_layout_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(EvalError, match=r"V602"):
        gqa.read_questions({"questions": str(tmp_path / "q.json")})


def test_wrong_ids_labels_and_parsers_are_refused(tmp_path: Path) -> None:
    question = {"question_id": 1, "text": "?", "label": "red"}
    with pytest.raises(EvalError, match=r"V601.*missing answers: 1.*extra answers: 2"):
        gqa.score([question], [{"question_id": 2, "text": "red"}])
    with pytest.raises(EvalError, match=r"V602.*question 1: label must be text"):
        gqa.score([{**question, "label": 3}], [{"question_id": 1, "text": "red"}])
    with pytest.raises(ConfigError, match="no parser 'lmms'"):
        gqa.score([], [], parser="lmms")
    write_rows(tmp_path / "q.jsonl", [question])
    with pytest.raises(EvalError, match="no key 'image'"):
        gqa.read_questions({"questions": str(tmp_path / "q.jsonl")})
