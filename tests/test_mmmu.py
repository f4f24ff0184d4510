"""MMMU: answers to the figures of subjects, domains and the whole; the command, with a model and without."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_bundle import FakeBundle
from mmmu_rows import COLOURS, ROWS, items, write_layout

import vlmpeft
from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import mmmu
from vlmpeft.eval.choices import chance_letter
from vlmpeft.eval.choices_run import evaluate


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "mmmu")


GIVEN = {
    "validation_Art_1": "A",
    "validation_Art_Theory_1": "(A)",
    "validation_Math_1": "junk",
    "validation_Math_2": "3.43",
    "validation_Math_3": "A",
    "validation_Clinical_Medicine_12": "B",
}


def test_overall_is_the_mean_over_questions_not_over_subjects_or_domains() -> None:
    metrics = mmmu.score(GIVEN, ROWS, parser="strict")
    assert (metrics["correct"], metrics["n"], metrics["accuracy"]) == (3, 6, 0.5)
    sizes = {"Art": (1, 1), "Art_Theory": (0, 1), "Math": (2, 3), "Clinical_Medicine": (0, 1)}
    assert {name: (m["correct"], m["n"]) for name, m in metrics["subjects"].items()} == sizes
    domains = {"Art and Design": 0.5, "Science": pytest.approx(2 / 3), "Health and Medicine": 0.0}
    assert {name: m["accuracy"] for name, m in metrics["domains"].items()} == domains
    assert len(metrics["missing_subjects"]) == 26


def test_official_parser_draws_a_letter_by_id_and_says_how_often() -> None:
    metrics = mmmu.score(GIVEN, ROWS)
    drawn = chance_letter("validation_Math_1", {"A": "cat", "B": "dog"}) == "A"
    assert (metrics["unparsable"], metrics["by_chance"]) == (1, 1)
    assert metrics["correct"] == 3 + drawn
    assert metrics["accuracy_without_chance"] == 0.5


def test_chance_depends_on_nothing_but_the_id_and_is_uniform() -> None:
    options = dict.fromkeys("ABCD", "")
    drawn = [chance_letter(f"validation_Art_{n}", options) for n in range(4000)]
    assert all(abs(drawn.count(letter) - 1000) < 5 * 27.4 for letter in "ABCD")  # 5 standard deviations
    assert drawn == [chance_letter(f"validation_Art_{n}", options) for n in range(4000)]


def test_order_of_answers_and_of_items_changes_nothing() -> None:
    junk = {r["id"]: "?" for r in ROWS}
    expected = mmmu.score(junk, ROWS)
    for seed in range(10):
        draw = random.Random(seed)
        answers = [{"id": key, "text": text} for key, text in draw.sample(list(junk.items()), 6)]
        assert mmmu.score(answers, draw.sample(ROWS, 6)) == expected


def test_strict_decides_nothing_by_chance_and_wants_the_letter_or_the_text_alone() -> None:
    wordy = {**GIVEN, "validation_Art_1": "It is A", "validation_Math_2": "it is 24/7", "validation_Math_3": " A. "}
    metrics = mmmu.score(wordy, ROWS, parser="strict")
    assert (metrics["correct"], metrics["by_chance"]) == (1, 0)
    assert mmmu.score({**GIVEN, "validation_Math_2": "24/7"}, ROWS, parser="strict")["correct"] == 3


@pytest.mark.parametrize(
    ("said", "right", "unparsable"),
    [
        ("A", True, 0),
        ("(A)", False, 1),
        ("A.", False, 1),
        (" A", False, 1),
        ("a", False, 1),
        ("B", False, 0),
        ("", False, 1),
    ],
)
def test_eval_only_compares_letters_and_draws_nothing(said: str, right: bool, unparsable: int) -> None:
    """main_eval_only.py: {id: letter or text}, the letter compared as it is, open answers by the open parser."""
    metrics = mmmu.score({"validation_Art_1": said, "validation_Math_2": "it is 3.43"}, [ROWS[0], ROWS[3]], "eval-only")
    assert (metrics["correct"], metrics["unparsable"], metrics["by_chance"]) == (1 + right, unparsable, 0)


def test_lmms_eval_parser_reads_other_letters() -> None:
    said = {**GIVEN, "validation_Math_1": "A. cat"}
    assert mmmu.score(said, ROWS)["by_chance"] == 1
    assert mmmu.score(said, ROWS, parser="lmms-eval")["by_chance"] == 0
    with pytest.raises(ConfigError, match="did you mean 'lmms-eval'"):
        mmmu.score(said, ROWS, parser="lmms_eval")


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([{"id": k, "text": t} for k, t in list(GIVEN.items())[1:]], "1 missing answers: validation_Art_1"),
        ({**GIVEN, "validation_Art_2": "A"}, "1 extra answers: validation_Art_2"),
        ([{"id": k, "text": t} for k, t in [*GIVEN.items(), ("validation_Art_1", "B")]], "1 repeated answers"),
        ([{"text": t} for t in GIVEN.values()], "nothing is joined by position"),
    ],
)
def test_answers_that_do_not_match_are_refused(answers: Any, says: str) -> None:
    with pytest.raises(EvalError, match="V601") as caught:
        mmmu.score(answers, ROWS)
    assert says in caught.value.line()


def test_hidden_answers_give_counts_and_no_accuracy() -> None:
    hidden = [{**r, "answer": "?"} for r in ROWS]
    metrics = mmmu.score(GIVEN, hidden)
    assert (metrics["n"], metrics["by_chance"], metrics["answers"]) == (6, 1, "hidden")
    assert "accuracy" not in metrics
    with pytest.raises(EvalError, match=r"1 of 6 items have no right answer; the first is validation_Art_1"):
        mmmu.score(GIVEN, [hidden[0], *ROWS[1:]])


def test_command_scores_given_answers_without_torch(data: Path, tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text(json.dumps(GIVEN))
    code = (
        "import sys; from vlmpeft.eval import mmmu; "
        f"mmmu.main(['data={data}', 'answers={tmp_path}/given.json', 'parser=strict']); "
        "heavy = {'torch', 'transformers', 'PIL', 'tqdm'} & set(sys.modules); sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = {"benchmark": "mmmu", "parser": "strict", "split": "validation", "mode": "first", "prompt": "official"}
    assert json.loads(done.stdout) == {**about, **mmmu.score(GIVEN, ROWS, "strict")}


def test_command_refuses_an_id_twice_in_one_object(data: Path, tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text('{"validation_Art_1": "A", "validation_Art_1": "B"}')
    assert run_command(mmmu.main, [f"data={data}", f"answers={tmp_path}/given.json"]) == 8


def test_command_asks_a_model_and_writes_what_it_said_and_how_it_was_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = FakeBundle({"Ratio": " 24/7.\n", "Compare": "no idea", "Which": "(A)"}, default="B")
    monkeypatch.setattr(vlmpeft, "load", lambda model, device: bundle)
    out = tmp_path / "out"
    assert run_command(mmmu.main, ["model=m", f"data={data}", f"out={out}", "mode=interleave", "batch_size=2"]) == 0
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    by_id = {a["question_id"].removeprefix("validation_"): a for a in answers}
    assert by_id["Math_2"]["text"] == "24/7."  # as it came, white space aside
    assert by_id["Math_1"] == {
        "question_id": "validation_Math_1", "prompt": items(data, mode="interleave")["Math_1"].prompt,
        "text": "no idea", "parsed": None, "by_chance": True,
        "correct": chance_letter("validation_Math_1", {"A": "", "B": ""}) == "A", "answer": "A",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    expected = mmmu.score(answers, ROWS)
    assert {key: metrics[key] for key in expected} == expected
    assert (metrics["mode"], metrics["parser"], metrics["by_chance"]) == ("interleave", "official", 1)
    assert "1 decided by chance" in capsys.readouterr().out
    shown = dict(zip(bundle.prompts, bundle.shown, strict=True))
    compared = next(pictures for prompt, pictures in shown.items() if prompt.startswith("Compare"))
    assert [pixel for _, pixel in compared] == [COLOURS["blue"], COLOURS["red"], COLOURS["blue"]]
    assert not any(Path(file).exists() for files in bundle.files for file in files)  # they were for the run alone


def test_blanked_pictures_keep_their_size(data: Path) -> None:
    bundle, asked = FakeBundle(), list(items(data).values())
    evaluate(bundle, asked, mmmu.JUDGES["official"], ablate="blank", progress=False)
    assert {s for pictures in bundle.shown for s in pictures} == {((6, 4), (122, 116, 104))}
