"""Answers join questions by id, or by image and question, and are refused otherwise."""

from __future__ import annotations

import random

import pytest
from pope_rows import TEN, refused, rows, three_settings

from vlmpeft.eval import pope


def test_missing_extra_and_repeated_answers_are_refused_and_listed() -> None:
    questions, answers = TEN
    other = {"question_id": 77, "text": "No"}
    line = refused(questions, [*answers[:1], *answers[3:], answers[4], other])
    assert "2 missing answers: 2, 3" in line
    assert "1 extra answers: 77" in line
    assert "1 repeated answers: 5" in line


@pytest.mark.parametrize("index", range(10))
def test_any_one_answer_dropped_or_doubled_is_refused(index: int) -> None:
    questions, answers = TEN
    assert "missing" in refused(questions, answers[:index] + answers[index + 1 :])
    assert "repeated" in refused(questions, [*answers, answers[index]])


def test_repeated_question_ids_are_refused() -> None:
    questions, answers = TEN
    assert "1 repeated questions: 1" in refused([*questions, questions[0]], answers)


def test_long_lists_of_ids_are_cut_with_their_number() -> None:
    questions, _ = rows("yn" * 1500, ["Yes"] * 3000)
    line = refused(questions, [])
    assert "3000 missing answers: 1, 2, 3" in line
    assert "and 2980 more" in line


def test_answers_to_the_3000_row_file_are_refused_on_the_2910_row_file() -> None:
    questions, answers = rows("yn" * 1500, ["Yes"] * 3000)
    assert "90 extra answers" in refused(questions[:2910], answers)


def test_answers_to_another_setting_with_the_same_ids_are_refused() -> None:
    questions, answers = TEN
    prompted = [{**a, "prompt": q["text"] + pope.SUFFIX} for q, a in zip(questions, answers, strict=True)]
    assert pope.score(questions, prompted) == pope.score(questions, answers)
    other = [{**q, "text": f"Is there a cat in the image, {q['question_id']}?"} for q in questions]
    assert "10 of 10 answers were given to another question" in refused(other, prompted)


def test_suffix_in_the_question_file_and_not_in_the_answers_is_no_other_question() -> None:
    questions, answers = TEN
    asked = [{**a, "question": q["text"]} for q, a in zip(questions, answers, strict=True)]
    assert pope.score([{**q, "text": q["text"] + pope.SUFFIX} for q in questions], asked) == pope.score(*TEN)


def test_answers_about_another_image_are_refused() -> None:
    questions, answers = TEN
    assert "1 of 10" in refused(questions, [{**answers[0], "image": "9.jpg"}, *answers[1:]])


def test_official_answers_without_ids_are_never_joined_by_position() -> None:
    questions, answers = TEN
    official = [{"question": q["text"], "answer": a["text"]} for q, a in zip(questions, answers, strict=True)]
    assert "nothing is joined by position" in refused(questions, official)


def test_answers_with_image_and_question_join_by_both() -> None:
    questions, answers = TEN
    named = [
        {"image": q["image"], "question": q["text"], "answer": a["text"]}
        for q, a in zip(questions, answers, strict=True)
    ]
    assert pope.score(questions, named[::-1]) == pope.score(questions, answers)
    assert "1 missing answers: 3.jpg/Is there a thing 3" in refused(questions, named[:2] + named[3:])
    moved = [{**named[0], "question": named[0]["question"].replace("image", "imange")}, *named[1:]]
    assert "1 extra answers" in refused(questions, moved)  # the old revision's spelling is another question


def test_answers_partly_without_ids_are_refused() -> None:
    questions, answers = TEN
    assert "without question_id: rows 10;" in refused(questions, [*answers[:9], {"text": "No"}])


@pytest.mark.parametrize("label", ["Yes", "", None, 1, "maybe"])
def test_label_other_than_yes_or_no_is_refused(label: object) -> None:
    questions, answers = rows("yn", ["Yes", "No"])
    assert "label must be 'yes' or 'no'" in refused([{**questions[0], "label": label}, questions[1]], answers, "V602")


@pytest.mark.parametrize("change", [{"text": None}, {"text": 1}, {"text": ["No"]}])
def test_answer_whose_text_is_not_text_is_refused(change: dict[str, object]) -> None:
    questions, answers = rows("yn", ["Yes", "No"])
    assert "the answer 1 has no text" in refused(questions, [{**answers[0], **change}, answers[1]], "V602")


@pytest.mark.parametrize("number", [None, 1.0, True, [1]])
def test_id_that_is_neither_integer_nor_text_is_refused(number: object) -> None:
    questions, answers = rows("yn", ["Yes", "No"])
    assert "question_id" in refused(questions, [{**answers[0], "question_id": number}, answers[1]], "V602")


def test_settings_are_scored_apart_and_averaged() -> None:
    metrics = pope.score_settings(*three_settings())
    assert list(metrics["settings"]) == ["random", "popular", "adversarial"]
    assert [m["accuracy"] for m in metrics["settings"].values()] == [1.0, 0.75, 0.5]
    assert metrics["mean_accuracy"] == pytest.approx(0.75)
    assert metrics["mean_f1"] == pytest.approx((1 + 0.8 + 2 / 3) / 3)  # not the F1 of the pooled rows, 12 / 15
    assert metrics["n"] == 12


def test_ids_repeated_across_settings_need_the_setting_in_the_answers() -> None:
    questions, answers = three_settings()
    draw = random.Random(3)
    assert pope.score_settings(questions, draw.sample(answers, 12)) == pope.score_settings(questions, answers)
    assert "repeated" in refused(questions, [{k: v for k, v in a.items() if k != "setting"} for a in answers])
    swapped = [{**a, "setting": "popular" if a["setting"] == "random" else a["setting"]} for a in answers]
    assert "missing answers: random/1" in refused(questions, swapped)


def test_globally_unique_ids_need_no_setting_in_the_answers() -> None:
    questions, answers = three_settings()
    unique = [{**q, "question_id": i} for i, q in enumerate(questions)]
    bare = [{"question_id": i, "text": a["text"]} for i, a in enumerate(answers)]
    assert pope.score_settings(unique, bare) == pope.score_settings(questions, answers)
