"""MME: both parsers, accuracy and accuracy+ per task, the two sums, the official folders of text files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from told_bundle import load_told, touch

from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import mme
from vlmpeft.eval.rows import read_rows, write_rows

Rows = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("text", "official", "lmms_eval"),
    [
        ("Yes", "yes", "yes"),
        ("no", "no", "no"),
        ("YES, it is", "yes", "yes"),
        ("No, it is not. Yes.", "no", "no"),  # four characters are read
        ("A yes", "other", "other"),  # "a ye"
        ("Eyes", "yes", "yes"),  # contains it
        ("know", "no", "no"),
        ("snow", "no", "no"),
        ("none", "no", "no"),
        ("not", "no", "no"),
        ("The answer is yes", "other", "other"),
        ("  yes", "other", "yes"),  # nothing is stripped officially
        (" yes", "yes", "yes"),  # one space still leaves room for three letters
        ("\n\nno", "no", "no"),
        ("\n\n\nno", "other", "no"),
        ("y", "other", "yes"),  # a lone letter counts for lmms-eval
        ("N", "other", "no"),
        ("y.", "other", "yes"),
        ("n o", "other", "other"),
        ("n.o", "other", "no"),  # without full stops
        ("", "other", "other"),
        ("maybe", "other", "other"),
    ],
)
def test_parsers_follow_their_rules(text: str, official: str, lmms_eval: str) -> None:
    assert mme.parse_answer(text) == official
    assert mme.parse_answer(text, "lmms-eval") == lmms_eval


@pytest.mark.parametrize(
    ("text", "vlmevalkit", "strict"),
    [
        ("Yes", "yes", "yes"),
        (" no\n", "no", "no"),
        ("No.", "no", "no"),
        ("Yes, it is", "yes", "other"),  # the word among others; the word alone
        ("The answer is yes", "yes", "other"),  # at any place
        ("know", "other", "other"),  # words, not beginnings
        ("yes or no", "other", "other"),  # not both
        ("y", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_vlmevalkit_wants_the_word_and_strict_the_word_alone(text: str, vlmevalkit: str, strict: str) -> None:
    assert (mme.parse_answer(text, "vlmevalkit"), mme.parse_answer(text, "strict")) == (vlmevalkit, strict)


def rows(task: str, said: str) -> tuple[Rows, Rows]:
    """Two questions an image, yes then no; `said` has two letters an image: y, n or o(ther)."""
    questions: Rows = []
    answers: Rows = []
    for i, letter in enumerate(said):
        number = f"{task}-{i}"
        label = ("Yes", "No")[i % 2]
        place = {"question_id": number, "image": f"{i // 2}.jpg", "text": f"Is it {number}?"}
        questions.append({**place, "label": label, "category": task})
        answers.append({"question_id": number, "text": {"y": "Yes", "n": "No", "o": "Perhaps"}[letter]})
    return questions, answers


def both(*parts: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
    return [q for part in parts for q in part[0]], [a for part in parts for a in part[1]]


def test_a_task_scores_accuracy_and_pairs() -> None:
    metrics = mme.score(*rows("count", "ynyyonno"))  # images right: both, one, one, none
    assert metrics["tasks"]["count"] == {
        **{"score": pytest.approx(50 + 25), "accuracy": 0.5, "accuracy_plus": 0.25},
        **{"n": 8, "other": 2},
    }
    assert (metrics["other"], metrics["accuracy"], metrics["n"]) == (2, 0.5, 8)


def test_perception_and_cognition_are_sums_of_their_tasks() -> None:
    metrics = mme.score(*both(rows("existence", "ynyn"), rows("OCR", "yyyn"), rows("code_reasoning", "yyyy")))
    assert metrics["perception"] == pytest.approx(200 + 75 + 50)
    assert metrics["cognition"] == pytest.approx(50)  # always yes: half of the answers, no image
    assert len(metrics["missing_tasks"]) == 11
    assert "existence" not in metrics["missing_tasks"]


def test_perfect_answers_reach_2000_and_800() -> None:
    metrics = mme.score(*both(*(rows(task, "ynyn") for task in mme.TASKS)))
    assert (metrics["perception"], metrics["cognition"], metrics["missing_tasks"]) == (2000, 800, [])


def test_images_are_paired_by_name_within_a_task_in_any_order() -> None:
    questions, answers = both(rows("count", "ynyyonno"), rows("color", "ynyn"))  # the image names repeat
    expected = mme.score(questions, answers)
    for seed in range(5):
        draw = random.Random(seed)
        assert mme.score(draw.sample(questions, 12), draw.sample(answers, 12)) == expected


def test_image_without_two_questions_is_refused() -> None:
    questions, answers = rows("count", "ynyn")
    with pytest.raises(EvalError, match=r"V602.*task count: image '1.jpg' has 1 questions, not two"):
        mme.score(questions[:3], answers[:3])


def test_unknown_tasks_labels_and_parsers_and_wrong_ids_are_refused() -> None:
    questions, answers = rows("count", "yn")
    with pytest.raises(EvalError, match="no task 'counts'; did you mean 'count'"):
        mme.score([{**q, "category": "counts"} for q in questions], answers)
    with pytest.raises(EvalError, match="label must be yes or no, got 'maybe'"):
        mme.score([{**q, "label": "maybe"} for q in questions], answers)
    with pytest.raises(ConfigError, match="no parser 'lms-eval'; did you mean 'lmms-eval'"):
        mme.score(questions, answers, parser="lms-eval")
    with pytest.raises(EvalError, match=r"V601.*missing answers: count-1.*extra answers: x.*repeated answers: count-0"):
        mme.score(questions, [answers[0], answers[0], {"question_id": "x", "text": "no"}])


def official(folder: Path, predictions: list[str] | None) -> Path:
    """A folder as in the official zip: count.txt and color.txt, two images each."""
    folder.mkdir()
    for t, task in enumerate(("count", "color")):
        lines = []
        for i in range(4):
            asked = f"Is it {task} {i % 2}? Please answer yes or no."
            cells = [f"{i // 2}.jpg", asked, ("Yes", "No")[i % 2]]
            lines.append("\t".join([*cells, *([predictions[4 * t + i]] if predictions else [])]))
        (folder / f"{task}.txt").write_text("\r\n".join(lines) + "\n")
    return folder


SAID = ["Yes", "No", "Yes", "Yes", "yes", "", "no", "no."]  # count: 3 right, 1 image; color: 2 right, no image


def test_official_folders_of_questions_and_predictions_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, said = official(tmp_path / "Questions", None), official(tmp_path / "Results", SAID)
    assert run_command(mme.main, [f"questions={asked}", f"answers={said}"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["tasks"]["count"]["score"] == pytest.approx(75 + 50)
    assert metrics["tasks"]["color"]["score"] == pytest.approx(50)
    assert metrics["perception"] == pytest.approx(175)
    assert run_command(mme.main, [f"questions={said}", f"answers={said}"]) == 0  # predictions are no part of a question
    assert json.loads(capsys.readouterr().out) == metrics


def test_folder_without_predictions_is_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = official(tmp_path / "Questions", None)
    assert run_command(mme.main, [f"questions={asked}", f"answers={asked}"]) == 8
    assert "has no fourth column, the prediction" in capsys.readouterr().err


def test_folder_with_other_questions_or_broken_lines_is_refused(tmp_path: Path) -> None:
    said = official(tmp_path / "Results", SAID)
    text = (said / "color.txt").read_text()
    (said / "color.txt").write_text(text.replace("color 0", "colour 0"))
    asked = official(tmp_path / "Questions", None)
    with pytest.raises(EvalError, match=r"V601.*2 missing answers: color/0.jpg/Is it color 0?"):
        mme.score(mme.read_questions({"questions": str(asked)}), mme.read_answers(str(said)))
    (asked / "color.txt").write_text("0.jpg Is it?\tYes\n")
    with pytest.raises(EvalError, match=r"V602.*color\.txt line 1: 2 tab-separated cells"):
        mme.read_questions({"questions": str(asked)})
    with pytest.raises(ConfigError, match=r"C102.*no TASK\.txt"):
        mme.read_questions({"questions": str(tmp_path)})


def test_model_is_asked_about_the_images_of_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = official(tmp_path / "Questions", None)
    images = touch(tmp_path / "MME", "count/0.jpg", "count/1.jpg", "color/images/0.jpg", "color/images/1.jpg")
    bundle = load_told(monkeypatch, {"0?": "Yes", "1?": "No"})
    arguments = ["model=M", f"questions={asked}", f"images={images}", f"out={tmp_path / 'out'}"]
    assert run_command(mme.main, arguments) == 0
    assert bundle.requests[0].prompt == "Is it count 0?\nAnswer the question using a single word or phrase."
    found = [str(Path(str(r.images[0])).relative_to(images.resolve())) for r in bundle.requests]
    assert found[::2] == ["count/0.jpg", "count/1.jpg", "color/images/0.jpg", "color/images/1.jpg"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["perception"] == 400
    answers = read_rows(tmp_path / "out" / "answers.jsonl")
    assert {(a["parsed"], a["label"]) for a in answers} == {("yes", "yes"), ("no", "no")}
    questions = mme.read_questions({"questions": str(asked)})
    assert mme.score(questions, answers[::-1])["perception"] == 400  # without the image folder at hand


def test_json_lines_are_asked_without_the_request_for_yes_or_no(tmp_path: Path) -> None:
    write_rows(tmp_path / "q.jsonl", [{**rows("count", "y")[0][0], "text": "Is it? Please answer yes or no."}])
    assert mme.read_questions({"questions": str(tmp_path / "q.jsonl")})[0]["text"] == "Is it?"
