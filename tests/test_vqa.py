"""VQA accuracy: the two normalisations, leave-one-out over ten annotators, OCR tokens in the prompt."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from told_bundle import load_told, touch

from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import vqa
from vlmpeft.eval.rows import read_rows, write_rows
from vlmpeft.eval.vqa_text import evalai, official

SHORT = "\nAnswer the question using a single word or phrase."

# (text, EvalAI's, the official script's); None where they are the same. What decides it stands beside.
NORMALISED = [
    ("Yes", "yes", None),  # lower case
    ("  yes \n", "yes", None),  # white space around
    ("red\tball", "red ball", None),  # a tab is a space
    ("the dog", "dog", None),  # articles go
    ("A", "", None),  # even alone
    ("none", "0", None),  # number words, none included
    ("Ten dogs", "10 dogs", None),
    ("eleven", "eleven", None),  # up to ten
    ("dont", "don't", None),  # contractions get their apostrophe
    ("couldnt've", "couldn't've", None),  # one of two left out
    ("couldn'tve", "couldn't've", None),  # or the other
    ("couldntve", "couldntve", None),  # not both
    ("yalld've", "yalld've", None),  # nor two of three
    ("y'alld've", "y'all'd've", None),
    ("ill", "ill", None),  # not in the list
    ("im", "im", None),  # listed with a capital, which never comes
    ("somebody'd", "somebodyd", None),  # the table's own slip
    ("it's", "it 's", "it's"),  # 's is set apart, by EvalAI alone
    ("red,blue", "redblue", "red blue"),  # EvalAI deletes commas first
    ("red, blue", "red blue", None),  # beside a space it goes
    ("1,000", "1000", None),  # within a number it goes
    ("1,000 red/blue", "1000 red blue", "1000 redblue"),  # digit,digit deletes every mark, and EvalAI took it away
    ("red/blue", "red blue", None),  # else a mark becomes a space
    ("red / blue", "red blue", None),
    ("red/ blue/green", "red bluegreen", None),  # one beside a space anywhere deletes them all
    ("half-full", "half full", None),
    ("why?", "why", None),
    ("stop!", "stop", None),
    ("(a)", "", None),
    ("50%", "50%", None),  # not in the list of marks
    ("5:30", "5:30", None),  # nor is the colon
    ("3.5", "3.5", None),  # a full stop before a digit stays
    ("5.", "5", None),
    ("U.S.", "us", None),
    (".5", ".5", None),
    ("a." * 40, "a" * 33 + "." + "a." * 7, None),  # at most 32 of them go; the last is no article
    ("", "", None),
]


@pytest.mark.parametrize(("text", "by_evalai", "by_script"), NORMALISED, ids=[repr(case[0]) for case in NORMALISED])
def test_normalisation_follows_the_rules(text: str, by_evalai: str, by_script: str | None) -> None:
    assert evalai(text) == by_evalai
    assert official(text) == (by_evalai if by_script is None else by_script)


@pytest.mark.parametrize(
    ("matching", "accuracy"), [(10, 1.0), (9, 1.0), (4, 1.0), (3, 0.9), (2, 0.6), (1, 0.3), (0, 0.0)]
)
def test_ten_annotators_left_out_in_turn(matching: int, accuracy: float) -> None:
    answers = ["red"] * matching + [f"other {i}" for i in range(10 - matching)]
    assert vqa.vqa_accuracy("red", answers) == accuracy


def test_accuracy_is_the_mean_over_every_nine_of_ten() -> None:
    for matching in range(11):
        answers = [i < matching for i in range(10)]
        nines = [min(1.0, sum(nine) / 3) for nine in itertools.combinations(answers, 9)]
        texts = ["red" if same else "blue" for same in answers]
        assert vqa.vqa_accuracy("red", texts) == pytest.approx(sum(nines) / 10)


@pytest.mark.parametrize(
    ("text", "answers", "by_evalai", "by_script"),
    [
        ("Yes", ["yes"] * 10, 1.0, 0.0),  # the script compares raw texts where all ten agree
        ("yes ", ["yes"] * 10, 1.0, 1.0),  # but strips them
        ("Yes", ["yes"] * 9 + ["no"], 1.0, 1.0),  # with one dissent both normalise
        ("two dogs", ["2 dogs"] * 3 + ["dogs"] * 7, 0.9, 0.9),
        ("dog's", ["dog 's"] * 2 + ["cat"] * 8, 0.6, 0.0),
        ("", ["yes"] * 10, 0.0, 0.0),
    ],
)
def test_both_scorers_compare_after_their_own_normalisation(
    text: str, answers: list[str], by_evalai: float, by_script: float
) -> None:
    assert vqa.answer_accuracy(text, answers, "evalai") == by_evalai
    assert vqa.answer_accuracy(text, answers, "vqav2") == by_script


def question(number: int, matching: int, category: str = "other") -> dict[str, Any]:
    """Asked of an image; `matching` of ten annotators say red."""
    answers = ["red"] * matching + [f"other {i}" for i in range(10 - matching)]
    place = {"question_id": number, "image": f"{number}.png", "text": f"Colour {number}?", "category": category}
    return {**place, "answers": answers, "ocr_tokens": ["STOP", "5"]}


QUESTIONS = [question(1, 10, "easy"), question(2, 3), question(3, 1)]
ANSWERS = [{"question_id": i, "text": "Red."} for i in (3, 1, 2)]


def test_scores_are_averaged_in_all_and_per_category() -> None:
    metrics = vqa.score(QUESTIONS, ANSWERS)
    assert metrics["accuracy"] == pytest.approx((1 + 0.9 + 0.3) / 3)
    assert {name: m["accuracy"] for name, m in metrics["categories"].items()} == {"easy": 1.0, "other": 0.6}
    low, high = metrics["accuracy_ci95"]
    assert 0.3 < low < metrics["accuracy"] < high <= 1


def test_the_normaliser_decides_and_is_refused_if_unknown() -> None:
    assert vqa.score(QUESTIONS[:1], ANSWERS[1:2], normaliser="vqav2")["accuracy"] == 0.0  # ten equal answers, raw
    with pytest.raises(ConfigError, match="no normaliser 'evalia'; did you mean 'evalai'"):
        vqa.score(QUESTIONS, ANSWERS, normaliser="evalia")


def test_missing_extra_and_repeated_answers_are_refused() -> None:
    with pytest.raises(EvalError, match=r"V601.*missing answers: 2.*extra answers: 9.*repeated answers: 1"):
        vqa.score(QUESTIONS, [ANSWERS[0], ANSWERS[1], ANSWERS[1], {"question_id": 9, "text": "x"}])


@pytest.mark.parametrize("answers", [None, "red", [], [1] * 10])
def test_annotations_that_are_no_list_of_texts_are_refused(answers: object) -> None:
    with pytest.raises(EvalError, match=r"V602.*question 1: answers must be a list of texts"):
        vqa.score([{**QUESTIONS[0], "answers": answers}], ANSWERS[1:2])


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[list[str], dict[str, Any]]:
    """Run the command. Returns: the prompts, metrics.json."""
    bundle = load_told(monkeypatch, {"Colour 1": "red", "Colour 2": "Red", "Colour 3": "blue"})
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    images = touch(tmp_path / "images", "1.png", "2.png", "3.png")
    paths = [f"questions={tmp_path / 'q.jsonl'}", f"images={images}", f"out={tmp_path / 'out'}"]
    assert run_command(vqa.main, ["model=M", *paths, *more]) == 0
    return [r.prompt for r in bundle.requests], json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_prompt_is_the_question_and_the_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, metrics = run(tmp_path, monkeypatch)
    assert prompts[0] == "Colour 1?" + SHORT
    assert (metrics["benchmark"], metrics["ocr_tokens"]) == ("vqav2", "not in the prompt")
    assert metrics["accuracy"] == pytest.approx(1.9 / 3)


def test_ocr_tokens_come_between_question_and_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, metrics = run(tmp_path, monkeypatch, "dataset=textvqa", "ocr=true")
    assert prompts[0] == "Colour 1?\nReference OCR token: STOP, 5" + SHORT
    assert (metrics["benchmark"], metrics["ocr_tokens"]) == ("textvqa", "in the prompt")


def test_vizwiz_may_be_unanswerable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, _ = run(tmp_path, monkeypatch, "dataset=vizwiz")
    hint = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert prompts[0] == "Colour 1?" + hint + SHORT


def test_answers_of_a_run_score_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, metrics = run(tmp_path, monkeypatch, "dataset=textvqa", "ocr=true")
    capsys.readouterr()
    answers = tmp_path / "out" / "answers.jsonl"
    assert [row["score"] for row in read_rows(answers)] == [1.0, 0.9, 0.0]
    arguments = [f"questions={tmp_path / 'q.jsonl'}", f"answers={answers}", "dataset=textvqa", "ocr=true"]
    assert run_command(vqa.main, arguments) == 0
    assert metrics.items() >= json.loads(capsys.readouterr().out).items()
    assert run_command(vqa.main, arguments[:3]) == 0  # the prompt then holds more than the question; still its answer


def test_missing_ocr_tokens_are_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = load_told(monkeypatch, {})
    write_rows(tmp_path / "q.jsonl", [{k: v for k, v in QUESTIONS[0].items() if k != "ocr_tokens"}])
    paths = [f"questions={tmp_path / 'q.jsonl'}", f"images={tmp_path}", f"out={tmp_path}"]
    assert run_command(vqa.main, ["model=M", *paths, "ocr=true"]) == 8
    assert "question 1: ocr=true, but ocr_tokens is None" in capsys.readouterr().err
    assert bundle.requests == []


@pytest.mark.parametrize("name", ["vqa", "gqa", "mme", "hallusion", "mmvet", "summary"])
def test_scorers_import_no_torch(name: str) -> None:
    heavy = "{'torch', 'transformers', 'PIL', 'numpy', 'tqdm'}"
    code = f"import sys, vlmpeft.eval.{name}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
