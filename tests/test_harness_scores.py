"""Our POPE and MMMU figures against the functions of the released lmms-eval: equal by equal rules, told apart else."""

from __future__ import annotations

import importlib
import itertools
import random
from typing import Any

import pytest
from PIL import Image

from vlmpeft.eval import mmmu, pope
from vlmpeft.eval.mmmu_parse import parse_multi_choice_lmms_eval

NAMES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}  # ours, theirs
CHANCE = "?"  # what their draw gives here


def theirs(name: str) -> Any:
    """A module of lmms-eval."""
    try:
        return importlib.import_module(f"lmms_eval.tasks.{name}")
    except ModuleNotFoundError as error:
        return pytest.fail(f"{error}: make install-dev installs lmms-eval, which these tests are about")


@pytest.fixture(scope="module")
def their_pope() -> Any:
    return theirs("pope.utils")


@pytest.fixture(scope="module")
def their_mmmu() -> Any:
    return theirs("mmmu.utils")


def both_pope(
    their_pope: Any, labels: list[str], texts: list[str], parser: str = "official"
) -> tuple[dict[str, Any], dict[str, float]]:
    """Our metrics and theirs of the same answers."""
    questions = [{"question_id": i, "label": label} for i, label in enumerate(labels)]
    answers = [{"question_id": i, "text": text} for i, text in enumerate(texts)]
    ours = pope.score(questions, answers, parser=parser)
    pairs = zip(questions, texts, strict=True)
    kept = [their_pope.pope_process_results({**q, "answer": q["label"]}, [text]) for q, text in pairs]
    names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
    rows = {name: [row[f"pope_{name}"] for row in kept] for name in names}
    return ours, {name: getattr(their_pope, f"pope_aggregate_{name}")(rows[name]) for name in names}


@pytest.mark.parametrize("seed", range(5))
def test_pope_is_equal_where_every_answer_is_yes_or_no(their_pope: Any, seed: int) -> None:
    rng = random.Random(seed)
    labels = [rng.choice(["yes", "no"]) for _ in range(300)]
    texts = [rng.choice(["Yes", "yes", "No", "no", " yes", "YES"]) for _ in labels]
    ours, found = both_pope(their_pope, labels, texts)
    assert 0.3 < ours["accuracy"] < 0.7
    for name, their_name in NAMES.items():
        assert ours[name] == pytest.approx(found[their_name], abs=1e-12)
    assert found["yes_ratio"] == labels.count("yes") / 300  # theirs is of the labels, ours of the answers
    assert ours["yes_ratio"] == sum(text.strip().lower() == "yes" for text in texts) / 300


@pytest.mark.parametrize("seed", range(5))
def test_pope_under_parser_lmms_eval_is_theirs_whatever_is_said(their_pope: Any, seed: int) -> None:
    rng = random.Random(seed)
    labels = [rng.choice(["yes", "no"]) for _ in range(300)]
    texts = [rng.choice(["Yes", "NO", "no", "Yes.", "", "not", " yes\n", "maybe", "No, there is"]) for _ in labels]
    ours, found = both_pope(their_pope, labels, texts, "lmms-eval")
    assert 0.1 < ours["accuracy"] < 0.5
    for name, their_name in NAMES.items():
        assert ours[name] == pytest.approx(found[their_name], abs=1e-12)


@pytest.mark.parametrize(
    ("text", "label", "right_for_us", "right_for_them"),
    [
        ("Yes.", "yes", True, False),  # they compare the whole answer
        ("No, there is no dog.", "no", True, False),
        ("no dog", "no", True, False),
        ("", "yes", True, False),  # the official parser takes what is not no for yes
        ("maybe", "yes", True, False),
        ("maybe", "no", False, False),
        ("NO", "no", False, True),  # the official parser knows No, no and not
        ("NO", "yes", True, False),
        ("Yes", "yes", True, True),
        ("no", "no", True, True),
    ],
)
def test_pope_answers_that_the_two_rules_tell_apart(
    their_pope: Any, text: str, label: str, right_for_us: bool, right_for_them: bool
) -> None:
    ours, found = both_pope(their_pope, [label], [text])
    assert (ours["accuracy"], found["accuracy"]) == (right_for_us, right_for_them)


def test_pope_answers_that_are_neither_vanish_from_their_precision_and_recall(their_pope: Any) -> None:
    labels = ["yes", "yes", "yes", "no", "no"]
    ours, found = both_pope(their_pope, labels, ["yes", "Yes.", "no", "Yes.", "no"])
    assert (ours["accuracy"], ours["precision"], ours["recall"]) == (3 / 5, 2 / 3, 2 / 3)
    assert (found["accuracy"], found["precision"], found["recall"]) == (2 / 5, 1 / 1, 1 / 2)


def test_pope_of_three_settings_is_a_mean_of_f1_for_us_and_pooled_for_them(their_pope: Any) -> None:
    labels = ["yes", "no"] * 3
    texts = ["yes", "no", "yes", "yes", "no", "no"]
    questions = [{"question_id": i, "setting": str(i // 2), "label": label} for i, label in enumerate(labels)]
    answers = [{**q, "text": text} for q, text in zip(questions, texts, strict=True)]
    _, found = both_pope(their_pope, labels, texts)
    scores = pope.score_settings(questions, answers)
    assert scores["mean_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores["pooled_f1"] == pytest.approx(found["f1_score"]) == pytest.approx(2 / 3)


OPTIONS = {"A": "10", "B": "a red circle", "C": "DNA", "D": "100"}
WORDS = [
    "A",
    "B",
    "C",
    "D",
    "(A)",
    "(C)",
    "B.",
    "A,",
    "the answer is",
    "DNA",
    "a red circle",
    "100",
    "because",
    "it is",
]
RESPONSES = [" ".join(words) for count in (1, 2, 3) for words in itertools.product(WORDS, repeat=count)]
RESPONSES += [
    "B.,",
    "'C'",
    "D!?",
    "A\n",
    "It is surely and without a doubt 100",
    "so it must be a red circle, I would say",
]


def their_choice(module: Any, response: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Their letter; CHANCE where they draw one."""
    draw = importlib.import_module("lmms_eval.tasks._task_utils.mmmu_mcq_utils")
    monkeypatch.setattr(draw, "random", type("Draw", (), {"choice": staticmethod(lambda letters: CHANCE)}))
    return str(module.parse_multi_choice_response(response, list(OPTIONS), OPTIONS))


def test_mmmu_choices_under_parser_lmms_eval_are_theirs(their_mmmu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {r: their_choice(their_mmmu, r, monkeypatch) for r in RESPONSES}
    assert {r: parse_multi_choice_lmms_eval(r, OPTIONS) or CHANCE for r in RESPONSES} == found
    assert set(found.values()) == {*OPTIONS, CHANCE}


@pytest.mark.parametrize(
    ("response", "official", "lmms_eval"),
    [
        ("it is DNA surely", None, "A"),  # "A " needs no space in front
        ("B. a red circle", None, "B"),
        ("C.  because", None, "C"),
        ("The answer is B", "B", "B"),
        ("(B) or (C)", "C", "C"),
        ("DNA (B)", "B", "B"),
    ],
)
def test_mmmu_choices_that_the_official_rule_reads_otherwise(
    their_mmmu: Any, monkeypatch: pytest.MonkeyPatch, response: str, official: str | None, lmms_eval: str
) -> None:
    assert mmmu.parse_multi_choice(response, OPTIONS) == official
    assert their_choice(their_mmmu, response, monkeypatch) == lmms_eval


OPEN = [
    "30",
    "The value is 30.",
    "x = 1,249,000",
    "-2.5e3 volts",
    "so it is, thus 7",
    "Yes\nfinal answer 4.129",
    "B",
    "",
]
OPEN += ["The unit is meters. The result is .963", "unknown", "24/7", "is ", "a = b = 3", "1_000", "nan", "30watts"]
GOLDS = ["30", "1249000", "-2500", "7", "4.13", "b", "no", "meters", "3", "24/7", "0.96", "1,000", "yes"]


def test_mmmu_open_answers_are_read_and_judged_as_they_do(their_mmmu: Any) -> None:
    judged = []
    for response in OPEN:
        parsed = their_mmmu.parse_open_response(response)
        assert sorted(map(str, mmmu.parse_open(response))) == sorted(map(str, parsed))
        for gold in GOLDS:
            judged.append(mmmu.is_correct_open(gold, response))
            assert judged[-1] == their_mmmu.eval_open(gold, parsed), (response, gold)
    assert 10 < sum(judged) < len(judged) - 10


def test_mmmu_of_several_right_texts_only_ours_knows(their_mmmu: Any) -> None:
    """The data set holds them as the text of a list, which they compare whole."""
    gold, response = "['24/7', '3.429']", "The ratio is 24/7"
    assert mmmu.is_correct_open(gold, response)
    assert not their_mmmu.eval_open(gold, their_mmmu.parse_open_response(response))
    assert their_mmmu.eval_open(["24/7", "3.429"], their_mmmu.parse_open_response(response))


def items(seed: int) -> list[dict[str, Any]]:
    """Questions of five subjects of uneven size, a fifth of them open."""
    rng, rows = random.Random(seed), []
    for subject, count in (("Art", 7), ("Art_Theory", 4), ("Math", 9), ("Public_Health", 3), ("Music", 5)):
        for n in range(count):
            is_open = n % 5 == 4
            row = {"id": f"validation_{subject}_{n + 1}", "question": f"Question {n} of <image 1>?"}
            row |= {"question_type": "open" if is_open else "multiple-choice"}
            row |= {"options": "[]" if is_open else str(list(OPTIONS.values()))}
            rows.append({**row, "answer": rng.choice(GOLDS) if is_open else rng.choice(list(OPTIONS))})
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_mmmu_overall_is_theirs(their_mmmu: Any, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng, rows = random.Random(seed + 10), items(seed)
    sure = [r for r in RESPONSES if parse_multi_choice_lmms_eval(r, OPTIONS)]
    said = {row["id"]: rng.choice(OPEN if row["question_type"] == "open" else sure) for row in rows}
    results = [their_mmmu.mmmu_process_results(row, [said[row["id"]]])["mmmu_acc"] for row in rows]
    ours = mmmu.score(said, rows, parser="lmms-eval")
    assert 0 < ours["accuracy"] < 1
    assert round(ours["accuracy"], 5) == their_mmmu.mmmu_aggregate_results(results)
    shown = capsys.readouterr().out
    for kind in ("subjects", "domains"):
        for name, group in ours[kind].items():
            label = name if kind == "subjects" else f"Overall-{name}"
            assert f"'{label}': {{'num': {group['n']}, 'acc': {round(group['accuracy'], 5)}}}" in shown


def test_mmmu_prompts_under_prompt_lmms_eval_are_theirs(their_mmmu: Any) -> None:
    asked = {
        "prompt_type": "format",
        "multiple_choice_prompt": "Answer with the option's letter from the given choices directly.",
        "open_ended_prompt": "Answer the question using a single word or phrase.",
    }
    for row in items(0):
        assert mmmu.item_of(row, prompt="lmms-eval").prompt == their_mmmu.mmmu_doc_to_text(row, asked)


@pytest.mark.parametrize("asked", ["none of it", "<image 2> or <image 1>, then <image 2>", "<image 3>"])
def test_mmmu_pictures_under_mode_lmms_eval_are_theirs(their_mmmu: Any, asked: str) -> None:
    pictures = {n: Image.new("RGB", (n, 1)) for n in (1, 2, 3)}
    row = {**items(0)[0], "question": asked, "options": "['<image 3>', 'x', '<image 1>', 'y']", "answer": "A"}
    theirs = their_mmmu.mmmu_doc_to_visual({**row, **{f"image_{n}": p for n, p in pictures.items()}})
    stored = {f"image_{n}": {"bytes": str(n).encode(), "path": None} for n in pictures}
    ours = mmmu.item_of({**row, **stored}, mode="lmms-eval", prompt="lmms-eval")
    assert [int(image) for image in ours.images] == [picture.width for picture in theirs]
    assert asked in ours.prompt


def test_pope_questions_are_asked_in_the_same_words(their_pope: Any) -> None:
    doc = {"question": "Is there a dog in the image?"}
    asked = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
    assert their_pope.pope_doc_to_text(doc, asked) == doc["question"] + pope.SUFFIX
