"""Short answers: normalisation, yes/no categories, accuracy by category."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmpeft.decode import Answer
from vlmpeft.errors import EvalError, run_command
from vlmpeft.eval import short
from vlmpeft.eval.rows import read_rows, write_rows

QUESTIONS = [
    {"question_id": 1, "image": "a.png", "text": "Is it a cat?", "label": "no", "category": "exists"},
    {"question_id": 2, "image": "a.png", "text": "Is it a dog?", "label": "yes", "category": "exists"},
    {"question_id": 3, "image": "a.png", "text": "How many?", "label": "3", "category": "count"},
    {"question_id": 4, "image": "a.png", "text": "How many ears?", "label": "two", "category": "count"},
    {"question_id": 5, "image": "a.png", "text": "What is it?", "label": "dog", "category": "name"},
    {"question_id": 6, "image": "a.png", "text": "Which side?", "label": "The left", "category": "name"},
]
TEXTS = ["No, a dog.", "unsure", "Three.", "3", "A dog.", "right"]
ANSWERS = [{"question_id": q["question_id"], "text": text} for q, text in zip(QUESTIONS, TEXTS, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dog", "dog"),
        ("  dog \n", "dog"),
        ("dog.", "dog"),
        ("dog .", "dog"),
        ("dog!?", "dog"),
        ("dog. ", "dog"),
        ("The dog", "dog"),
        ("a red  ball", "red ball"),
        ("an apple on the table", "apple on table"),
        ("three", "3"),
        ("Ten dogs", "10 dogs"),
        ("3", "3"),
        ("eleven", "eleven"),
        ("someone", "someone"),  # words, not substrings
        ("theatre", "theatre"),
        ("A", "a"),  # the letter of an option, not an article to drop
        ("3.5", "3.5"),  # only trailing punctuation goes
        (".5", ".5"),
        ("it's", "it's"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalisation_follows_the_documented_rules(text: str, expected: str) -> None:
    assert short.normalise(text) == expected


def test_every_number_word_equals_its_digits() -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    assert [short.normalise(word.upper() + ".") for word in words] == [str(n) for n in range(1, 11)]


def test_category_is_yes_no_only_if_all_its_labels_are() -> None:
    assert short.yes_no_categories(QUESTIONS) == {"exists"}
    mixed = {"question_id": 9, "image": "a.png", "text": "?", "label": "perhaps", "category": "exists"}
    assert short.yes_no_categories([*QUESTIONS, mixed]) == frozenset()


def test_accuracy_by_category_equals_the_count_by_hand() -> None:
    metrics = short.score(QUESTIONS, ANSWERS)
    assert metrics["categories"] == {
        "count": {"accuracy": 0.5, "accuracy_ci95": [0.0, 1.0], "correct": 1, "n": 2},
        "exists": {"accuracy": 1.0, "accuracy_ci95": [1.0, 1.0], "correct": 2, "n": 2},  # junk counts as yes
        "name": {"accuracy": 0.5, "accuracy_ci95": [0.0, 1.0], "correct": 1, "n": 2},
    }
    assert (metrics["accuracy"], metrics["correct"], metrics["n"]) == (pytest.approx(4 / 6), 4, 6)
    assert metrics["empty"] == 0


def test_order_of_answers_does_not_change_the_score() -> None:
    for seed in range(10):
        draw = random.Random(seed)
        assert short.score(draw.sample(QUESTIONS, 6), draw.sample(ANSWERS, 6)) == short.score(QUESTIONS, ANSWERS)


def test_empty_answer_is_wrong_and_counted() -> None:
    blank = [{**a, "text": " "} for a in ANSWERS]
    metrics = short.score(QUESTIONS, blank)
    assert (metrics["empty"], metrics["unparsable"]) == (6, 6)
    junk = short.score(QUESTIONS, [{**a, "text": "banana"} for a in ANSWERS])
    assert (junk["empty"], junk["unparsable"]) == (0, 2)  # the two questions of yes and no
    assert metrics["categories"]["name"]["correct"] == 0


def test_no_questions_give_accuracy_zero() -> None:
    nothing = {"accuracy": 0.0, "accuracy_ci95": [0.0, 0.0], "correct": 0, "n": 0}
    assert short.score([], []) == {**nothing, "empty": 0, "unparsable": 0, "by_chance": 0, "categories": {}}


def test_missing_repeated_and_extra_answers_are_refused() -> None:
    with pytest.raises(EvalError, match=r"V601.*missing answers: 1; 1 extra answers: 9; 1 repeated answers: 2"):
        short.score(QUESTIONS, [*ANSWERS[1:], ANSWERS[1], {"question_id": 9, "text": "x"}])


@pytest.mark.parametrize("label", [None, 3, " "])
def test_label_that_is_not_text_is_refused(label: object) -> None:
    with pytest.raises(EvalError, match=r"V602.*question 3: label must be text"):
        short.score([{**q, "label": label} if q["question_id"] == 3 else q for q in QUESTIONS], ANSWERS)


class FakeBundle:
    """Says of each of QUESTIONS what TEXTS says."""

    def answer(self, requests: Sequence[Any], *, contrast: object, **_: object) -> list[Answer]:
        assert contrast is None
        told = {str(q["text"]): text for q, text in zip(QUESTIONS, TEXTS, strict=True)}
        return [Answer(told[request.prompt.removesuffix(short.SUFFIX)]) for request in requests]

    def blank_image(self, image: Any) -> Any:
        raise AssertionError("not asked for")


def test_command_writes_answers_and_metrics_and_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vlmpeft

    monkeypatch.setattr(vlmpeft, "load", lambda directory, device: FakeBundle(), raising=False)
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    arguments = ["model=M", f"questions={tmp_path / 'q.jsonl'}", f"images={tmp_path}", f"out={tmp_path / 'out'}"]
    assert run_command(short.main, arguments) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["category", "n", "correct", "accuracy"]
    assert table[-1] == ["all", "6", "4", "0.6667"]
    answers = read_rows(tmp_path / "out" / "answers.jsonl")
    assert [a["correct"] for a in answers] == [True, True, True, False, True, False]
    assert set(answers[0]) == {"question_id", "image", "prompt", "text", "label", "category", "correct"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics.items() >= short.score(QUESTIONS, ANSWERS).items()


def test_scoring_given_answers_imports_no_torch(tmp_path: Path) -> None:
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    write_rows(tmp_path / "a.jsonl", ANSWERS)
    code = (
        "import sys; from vlmpeft.eval import short; "
        f"short.main(['questions={tmp_path / 'q.jsonl'}', 'answers={tmp_path / 'a.jsonl'}']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).items() >= short.score(QUESTIONS, ANSWERS).items()
