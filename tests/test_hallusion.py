"""HallusionBench: by answer, by question in all its forms and by figure; texts, judgements and two groupings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from told_bundle import load_told, touch

from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import hallusion
from vlmpeft.eval.rows import read_rows, write_rows

Rows = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("text", "contains", "words"),
    [
        ("Yes", "yes", "yes"),
        ("yes, it is", "yes", "yes"),
        ("No.", "no", "no"),
        ("Eyes", "yes", "unknown"),  # contains it, but is not the word
        ("yes and no", "yes", "unknown"),  # not both
        ("maybe", "no", "unknown"),  # neither
        ("", "no", "unknown"),
        ("It is not", "no", "unknown"),  # not is no no
        ("no/none", "no", "no"),  # a mark becomes a space
        ("YES!", "yes", "yes"),
        ("Yes: so", "yes", "unknown"),  # a colon is no mark
    ],
)
def test_parsers_follow_their_rules(text: str, contains: str, words: str) -> None:
    assert hallusion.parse_answer(text) == contains
    assert hallusion.parse_answer(text, "vlmevalkit") == words


@pytest.mark.parametrize(("text", "read"), [("Yes", "yes"), (" no.", "no"), ("Yes, it is", "unknown"), ("", "unknown")])
def test_strict_wants_the_word_alone(text: str, read: str) -> None:
    assert hallusion.parse_answer(text, "strict") == read


# (category, subcategory, set, figure, question, visual_input, truth): one VD set of two figures and two questions, one
# VS set asked without a figure, with it and with an edited one, and a VD and a VS set that share subcategory and ids.
TABLE = [
    ("VD", "chart", 0, 0, 0, 1, 1),
    ("VD", "chart", 0, 0, 1, 1, 0),
    ("VD", "chart", 0, 1, 0, 2, 0),
    ("VD", "chart", 0, 1, 1, 2, 1),
    ("VS", "map", 3, 0, 0, 0, 1),
    ("VS", "map", 3, 1, 0, 1, 1),
    ("VS", "map", 3, 2, 0, 2, 0),
    ("VD", "ocr", 1, 1, 0, 1, 1),
    ("VS", "ocr", 1, 1, 0, 1, 1),
]
FIELDS = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input", "gt_answer")


def official(folder: Path) -> Path:
    """HallusionBench.json of the table."""
    rows = []
    for cells in TABLE:
        row = dict(zip(FIELDS, map(str, cells), strict=True))
        name = f"./hallusion_bench/{cells[0]}/{cells[1]}/{cells[2]}_{cells[3]}.png" if cells[5] else None
        rows.append({**row, "question": f"Is it {'/'.join(map(str, cells[:5]))}?", "filename": name})
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    return folder / "HallusionBench.json"


@pytest.fixture
def questions(tmp_path: Path) -> Rows:
    return hallusion.read_questions({"questions": str(official(tmp_path))})


def said(questions: Rows, wrong: tuple[int, ...] = ()) -> Rows:
    """The right answers but for the rows of the table in `wrong`."""
    other = {"yes": "No", "no": "Yes"}
    texts = [other[q["label"]] if i in wrong else q["label"].title() for i, q in enumerate(questions)]
    return [{"question_id": q["question_id"], "text": text} for q, text in zip(questions, texts, strict=True)]


def shares(metrics: dict[str, Any]) -> list[float]:
    return [metrics[name] for name in ("aAcc", "qAcc", "fAcc", "easy", "hard")]


def test_questions_carry_what_the_file_says(questions: Rows) -> None:
    assert questions[3]["question_id"] == "VD/chart/0/1/1"
    assert questions[3]["image"] == "hallusion_bench/VD/chart/0_1.png"
    assert [q["label"] for q in questions[:3]] == ["yes", "no", "no"]
    assert [q["text_only"] for q in questions] == [i == 4 for i in range(9)]
    assert "image" not in questions[4]


def test_images_are_found_above_and_below_the_folder_that_their_names_begin_with(tmp_path: Path) -> None:
    file, images = official(tmp_path), touch(tmp_path / "images", "hallusion_bench/VD/chart/0_1.png")
    found = [hallusion.read_questions({"questions": str(file), "images": str(folder)})[3]["image"]
             for folder in (images, images / "hallusion_bench")]  # fmt: skip
    assert found == ["hallusion_bench/VD/chart/0_1.png", "VD/chart/0_1.png"]


def test_right_answers_score_one_everywhere(questions: Rows) -> None:
    metrics = hallusion.score(questions, said(questions))
    assert shares(metrics) == [1.0] * 5
    # questions: chart 0 and 1, map 0, VD ocr 0, VS ocr 0; figures: chart 0, 1, map 1, 2 (not 0), VD and VS ocr 1
    assert (metrics["n"], metrics["questions"], metrics["figures"]) == (9, 5, 6)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ((0,), [8 / 9, 4 / 5, 5 / 6, 4 / 5, 1.0]),  # chart question 0 and figure 0
        ((0, 1), [7 / 9, 3 / 5, 5 / 6, 3 / 5, 1.0]),  # both questions of figure 0
        ((0, 2), [7 / 9, 4 / 5, 4 / 6, 4 / 5, 2 / 3]),  # question 0 about both figures
        ((4,), [8 / 9, 4 / 5, 1.0, 4 / 5, 1.0]),  # VS without its figure: no figure is wrong
        ((6,), [8 / 9, 4 / 5, 5 / 6, 1.0, 2 / 3]),  # edited: hard, not easy
        ((7,), [8 / 9, 4 / 5, 5 / 6, 4 / 5, 1.0]),  # VD ocr leaves VS ocr alone
    ],
)
def test_wrong_answers_spoil_their_question_and_their_figure(
    wrong: tuple[int, ...], expected: list[float], questions: Rows
) -> None:
    for seed in range(3):
        answers = random.Random(seed).sample(said(questions, wrong), 9)
        assert shares(hallusion.score(questions, answers)) == pytest.approx(expected)


def test_vlmevalkit_leaves_out_text_and_merges_categories(questions: Rows) -> None:
    metrics = hallusion.score(questions, said(questions, (4, 7)), parser="vlmevalkit")
    assert (metrics["n"], metrics["questions"], metrics["figures"]) == (8, 4, 5)  # ocr 1 is one of each
    assert shares(metrics)[:3] == pytest.approx([7 / 8, 3 / 4, 4 / 5])  # row 4 is not asked
    assert metrics["mean"] == pytest.approx((7 / 8 + 3 / 4 + 4 / 5) / 3)


def test_strict_asks_about_all_and_groups_as_the_official_script_does(questions: Rows) -> None:
    answers = said(questions, (0,))
    metrics = hallusion.score(questions, [*answers[:8], {**answers[8], "text": "Yes, it is."}], parser="strict")
    assert (metrics["n"], metrics["questions"], metrics["figures"], metrics["unparsable"]) == (9, 5, 6, 1)
    assert shares(metrics)[:3] == pytest.approx([7 / 9, 3 / 5, 4 / 6])


def test_judgements_are_added_up_as_the_official_script_does(questions: Rows) -> None:
    codes = ["1", "1", "2", "0", "2", "1", "2", "1", "1"]  # unclear is right in row 4 alone: VS without its figure
    judged = [{"question_id": q["question_id"], "correctness": c} for q, c in zip(questions, codes, strict=True)]
    assert shares(hallusion.score_judgements(questions, judged)) == pytest.approx([6 / 9, 2 / 5, 4 / 6, 1.0, 0.0])
    with pytest.raises(EvalError, match=r"V602.*answer VD/chart/0/0/0: correctness must be 0, 1 or 2, got '3'"):
        hallusion.score_judgements(questions, [{**judged[0], "correctness": "3"}, *judged[1:]])
    with pytest.raises(EvalError, match=r"V601.*1 missing answers: VS/ocr/1/1/0"):
        hallusion.score_judgements(questions, judged[:8])


def test_missing_extra_and_repeated_answers_and_unknown_parsers_are_refused(questions: Rows) -> None:
    answers = said(questions)
    with pytest.raises(EvalError, match=r"V601.*missing answers: VS/ocr/1/1/0.*extra answers: x.*repeated"):
        hallusion.score(questions, [*answers[:8], answers[0], {"question_id": "x", "text": "yes"}])
    with pytest.raises(ConfigError, match="no parser 'contain'; did you mean 'contains'"):
        hallusion.score(questions, answers, parser="contain")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "expected a list of objects"),
        ("[3]", "expected a list of objects"),
        ('[{"category": "VD"}]', "row 1: no key 'subcategory'; did you mean 'category'"),
    ],
)
def test_file_of_another_layout_is_refused(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(EvalError, match=says):
        hallusion.read_questions({"questions": str(tmp_path / "q.json")})


def test_commands_ask_with_and_without_a_figure_and_score_the_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = official(tmp_path)
    names = [f"hallusion_bench/{c[0]}/{c[1]}/{c[2]}_{c[3]}.png" for c in TABLE if c[5]]
    images = touch(tmp_path / "images", *names)
    bundle = load_told(monkeypatch, {"": "Yes"})
    arguments = ["model=M", f"questions={file}", f"images={images}", f"out={tmp_path / 'out'}"]
    assert run_command(hallusion.main, arguments) == 0
    assert [len(r.images) for r in bundle.requests] == [int(i != 4) for i in range(9)]
    assert "aAcc" in capsys.readouterr().out
    answers = tmp_path / "out" / "answers.jsonl"
    assert read_rows(answers)[4]["image"] is None
    assert run_command(hallusion.main, [f"questions={file}", f"answers={answers}"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["aAcc"] == pytest.approx(6 / 9)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()).items() >= scored.items()


def test_judgements_have_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = official(tmp_path)
    ids = [q["question_id"] for q in hallusion.read_questions({"questions": str(file)})]
    write_rows(tmp_path / "j.jsonl", [{"question_id": number, "correctness": 1} for number in ids])
    assert run_command(hallusion.main, [f"questions={file}", f"judgements={tmp_path / 'j.jsonl'}"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["parser"], metrics["aAcc"]) == ("given judgements", 1.0)
