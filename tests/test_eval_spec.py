"""Rules that hold for every benchmark: prompts to the letter, nothing divided by zero, nothing in a file is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmpeft.decode import Request, exchange_of
from vlmpeft.errors import EvalError, run_command
from vlmpeft.eval import choice, gqa, hallusion, iconqa, mmbench, mme, mmmu, mmvet, pope, scienceqa, short, vqa
from vlmpeft.eval.choices import LETTER
from vlmpeft.eval.mmmu_data import item_of
from vlmpeft.eval.rows import read_rows, write_rows
from vlmpeft.layouts import ImageSlot
from vlmpeft.template import template_of

SHORT = "\nAnswer the question using a single word or phrase."


def test_suffixes_are_those_of_llava_15_table_9() -> None:
    assert SHORT == pope.SUFFIX
    assert LETTER == "\nAnswer with the option's letter from the given choices directly."
    for made in (gqa.benchmark({"parser": "official"}), mme.benchmark({"parser": "official"})):
        assert made.suffix == SHORT
    assert all(vqa.benchmark({**vqa.OPTIONS, "dataset": name}).suffix == SHORT for name in vqa.DATASETS)
    assert mmbench.BENCHMARK.options["suffix"] == LETTER
    assert scienceqa.BENCHMARK.options["suffix"] == choice.BENCHMARK.options["suffix"] == LETTER
    assert vqa.UNANSWERABLE == "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def test_mm_vet_questions_get_no_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(arguments: dict[str, Any], *_: object, **__: object) -> None:
        seen.update(arguments)

    monkeypatch.setattr(mmvet, "run", run)
    monkeypatch.setattr(mmvet, "read_questions", lambda path: [])
    mmvet.main(["model=M", "questions=Q", "images=I", "out=O"])
    assert seen["suffix"] == ""


def test_the_image_comes_first_then_a_line_break_then_the_question(tokenizer: Any) -> None:
    """`<system> USER: <image>\\n<question><suffix> ASSISTANT:`, one mark an image."""
    exchange = exchange_of(Request((Path("a.png"),), "Is it red?" + SHORT))
    segments = template_of("vicuna_v1", tokenizer).segments([exchange], "Be brief.")
    text = "".join("<image>" if s.kind == "image" else s.lead + s.text for s in segments)
    assert text.rstrip() == f"Be brief. USER: <image>\nIs it red?{SHORT} ASSISTANT:"
    two = exchange_of(Request((Path("a.png"), Path("b.png")), "Alike?")).question
    assert [isinstance(part, ImageSlot) for part in two] == [True, True, False]


@pytest.mark.parametrize(
    "score",
    [
        pope.score, pope.score_settings, short.score, gqa.score, vqa.score, mme.score, hallusion.score,
        lambda questions, answers: mmvet.score(questions, {}),
        lambda questions, answers: mmmu.score({}, []), lambda questions, answers: choice.score({}, []),
    ],
)  # fmt: skip
def test_no_questions_give_zeros_and_their_number(score: Any) -> None:
    metrics = score([], [])
    assert metrics["n"] == 0
    names = ("accuracy", "f1", "perception", "aAcc", "total")
    assert [metrics[name] for name in names if name in metrics] == [0.0] * sum(name in metrics for name in names)


def test_what_is_not_multiple_choice_is_open() -> None:
    row = {"id": "validation_Math_1", "question": "How many?", "options": "[]", "answer": "7"}
    for kind in ("open", "short-answer"):
        item = item_of({**row, "question_type": kind})
        assert item.options == {}
        assert mmmu.BENCHMARK.judge("official")(item, "it is 7").correct


def test_options_and_answers_of_a_file_are_read_as_literals_and_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"[open({str(canary)!r}, 'w')]"
    row = {"id": "validation_Math_1", "question": "?", "options": code, "answer": "A"}
    with pytest.raises(EvalError, match="V602"):
        item_of({**row, "question_type": "multiple-choice"})
    item = item_of({**row, "options": "[]", "answer": code, "question_type": "open"})
    assert item.answer == (code,)
    assert not canary.exists()


def test_every_letter_parser_says_none_where_it_finds_nothing() -> None:
    options = {"A": "cat", "B": "dog"}
    item = choice.item_of({"id": "1", "question": "?", "options": ["cat", "dog"], "answer": "A"})
    for benchmark in (mmmu.BENCHMARK, scienceqa.BENCHMARK, choice.BENCHMARK, iconqa.BENCHMARK):
        for name in benchmark.judges:
            verdict = benchmark.judge(name)(item, "")
            assert verdict.parsed is None, (benchmark.name, name)
            assert not verdict.correct or verdict.by_chance
    assert set(options) == set(item.options)


def test_mme_and_hallusion_count_what_they_cannot_read() -> None:
    asked = {"image": "a.png", "text": "Is it?", "label": "yes", "category": "existence"}
    questions = [{**asked, "question_id": 1}, {**asked, "question_id": 2, "label": "no"}]
    said = [{"question_id": 1, "text": "I cannot tell"}, {"question_id": 2, "text": "no"}]
    metrics = mme.score(questions, said)
    assert (metrics["unparsable"], metrics["by_chance"], metrics["accuracy"]) == (1, 0, 0.5)
    figure = {"category": "VD", "subcategory": "chart", "set_id": "0", "visual_input": "1", "text_only": False}
    rows = [
        {**figure, "figure_id": "1", "number": str(i), "question_id": str(i), "text": "?", "label": "yes"}
        for i in (0, 1)
    ]
    texts = [{"question_id": "0", "text": "yes or no"}, {"question_id": "1", "text": "perhaps"}]
    assert hallusion.score(rows, texts)["unparsable"] == 1
    assert hallusion.score(rows, texts, parser="vlmevalkit")["unparsable"] == 2


ASKED = {
    **{"question_id": 1, "id": "1", "image": "a.png", "text": "Is it?", "question": "Is it?", "label": "yes"},
    **{"category": "existence", "answers": ["yes"] * 10, "options": ["yes", "no"], "answer": "A"},
}


@pytest.mark.parametrize("module", [pope, short, choice, gqa, vqa, mme], ids=lambda module: module.__name__)
def test_every_figure_names_its_parser_and_counts_what_it_could_not_read_or_drew(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "q.jsonl", [ASKED, {**ASKED, "question_id": 2, "id": "2", "label": "no"}])
    write_rows(tmp_path / "a.jsonl", [{"question_id": "2", "text": ""}, {"question_id": "1", "text": "Yes"}])
    source = "data" if module is choice else "questions"
    assert run_command(module.main, [f"{source}={tmp_path / 'q.jsonl'}", f"answers={tmp_path / 'a.jsonl'}"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["parser"]
    assert (metrics["unparsable"], metrics["by_chance"], metrics["n"]) == (1, 0, 2)


def test_a_question_file_of_pope_keeps_what_its_owners_write(tmp_path: Path) -> None:
    """CRLF ends and "imange" of the older revision are read as they are: answers carry the same text."""
    line = '{"question_id": 1, "image": "1.jpg", "text": "Is there an ant in the imange?", "label": "no"}\r\n'
    (tmp_path / "random.json").write_bytes(line.encode())
    (row,) = read_rows(tmp_path / "random.json")
    assert row["text"] == "Is there an ant in the imange?"
