"""MMMU: parquet files to prompts and pictures, answers to the figures of subjects, domains and the whole."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fake_bundle import FakeBundle
from PIL import Image
from pyarrow import parquet

import vlmpeft
from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import mmmu
from vlmpeft.eval.choices import LETTER, chance_letter
from vlmpeft.eval.choices_run import evaluate

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour: str) -> dict[str, Any]:
    """A picture as the datasets library stores it."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), COLOURS[colour]).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{colour}.png"}


def row(name: str, question: str = "What is it?", answer: str = "A", **changes: Any) -> dict[str, Any]:
    """A multiple-choice row of MMMU's columns."""
    images = {f"image_{n}": None for n in range(1, 8)}
    own = {"id": f"validation_{name}", "question": question, "options": "['cat', 'dog']", "answer": answer}
    return {**own, "explanation": "", **images, "question_type": "multiple-choice", "subfield": "x", **changes}


def open_row(name: str, answer: str, **changes: Any) -> dict[str, Any]:
    return row(name, answer=answer, options="[]", question_type="open", **changes)


ROWS = [
    row("Art_1", "Look: <image 1>", image_1=png("red")),
    row("Art_Theory_1", "No place named", "B", image_1=png("green")),
    row("Math_1", "Compare <image 2> with <image 1>, then <image 2>.", image_1=png("red"), image_2=png("blue")),
    open_row("Math_2", "['24/7', '3.429']", question="Ratio in <image 1>?", image_1=png("red")),
    row("Math_3", "Which?", options="['<image 1>', '<image 2>', 'x']", image_1=png("red"), image_2=png("green")),
    row("Clinical_Medicine_12", "<image 1> and <image 3> and a literal <image>", image_1=png("blue")),
]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {f"image_{n}": image for n in range(1, 8)}
    columns = {key: pa.array([r[key] for r in rows], types.get(key, pa.string())) for key in rows[0]}
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The public layout: a folder a subject, a file a split."""
    for r in ROWS:
        subject = mmmu.subject_of(r["id"])
        mine = [x for x in ROWS if mmmu.subject_of(x["id"]) == subject]
        save(tmp_path / "mmmu" / subject / "validation-00000-of-00001.parquet", mine)
    save(tmp_path / "mmmu" / "Art" / "dev-00000-of-00001.parquet", [row("Art_9")])
    return tmp_path / "mmmu"


def items(data: Path, images: bool = True, **changes: str) -> dict[str, Any]:
    arguments = {"data": str(data), **mmmu.BENCHMARK.defaults, **changes}
    return {item.id.removeprefix("validation_"): item for item in mmmu.read_items(arguments, images)}


def test_there_are_30_subjects_in_6_domains() -> None:
    assert [len(subjects) for subjects in mmmu.DOMAINS.values()] == [4, 5, 5, 5, 4, 7]
    assert len({s for subjects in mmmu.DOMAINS.values() for s in subjects}) == 30


def test_subject_stands_between_the_first_and_the_last_underscore() -> None:
    assert mmmu.subject_of("validation_Diagnostics_and_Laboratory_Medicine_17") == "Diagnostics_and_Laboratory_Medicine"
    assert mmmu.subject_of("test_Art_1") == "Art"


def test_official_prompt_lists_the_options_in_brackets_and_leaves_a_blank_line(data: Path) -> None:
    found = items(data)
    assert found["Art_1"].prompt == (
        "Look: <image 1>\n(A) cat\n(B) dog\n\nAnswer with the option's letter from the given choices directly."
    )
    assert found["Math_2"].prompt == "Ratio in <image 1>?\nAnswer the question using a single word or phrase."


def test_lmms_eval_prompt_lists_the_options_with_a_stop(data: Path) -> None:
    found = items(data, prompt="lmms-eval")
    assert found["Art_1"].prompt == "Look: <image 1>\nA. cat\nB. dog\n" + LETTER
    assert found["Math_2"].prompt == "Ratio in <image 1>?\n\nAnswer the question using a single word or phrase."


def test_mode_first_shows_image_1_alone_and_keeps_the_places_in_the_text(data: Path) -> None:
    found = items(data)
    assert [len(item.images) for item in found.values()] == [1] * 6
    assert found["Math_1"].prompt.startswith("Compare <image 2> with <image 1>, then <image 2>.")


def test_mode_interleave_puts_each_image_where_it_is_named_twice_if_named_twice(data: Path) -> None:
    found = items(data, mode="interleave")
    assert found["Math_1"].prompt.startswith("Compare <image> with <image>, then <image>.\n")
    red, blue = png("red")["bytes"], png("blue")["bytes"]
    assert found["Math_1"].images == (blue, red, blue)
    assert "(A) <image>\n(B) <image>\n(C) x" in found["Math_3"].prompt
    assert found["Art_Theory_1"].images == ()  # no place names it


def test_no_mark_is_left_for_an_image_that_is_not_there_or_was_typed(data: Path) -> None:
    item = items(data, mode="interleave")["Clinical_Medicine_12"]
    assert item.prompt.startswith(r"<image> and <image 3> and a literal \<image>")
    assert len(item.images) == 1


def test_file_folder_split_and_its_short_name_are_found(data: Path) -> None:
    assert list(items(data, split="val")) == list(items(data))
    assert len(items(data)) == 6
    assert list(items(data, split="dev")) == ["Art_9"]
    assert list(items(data / "Art" / "dev-00000-of-00001.parquet")) == ["Art_9"]
    with pytest.raises(ConfigError, match=r"no test-\*.parquet.*choose split=dev\|validation"):
        items(data, split="test")


@pytest.mark.parametrize(("key", "value"), [("mode", "all"), ("prompt", "mine")])
def test_unknown_mode_and_prompt_are_refused(key: str, value: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}={value}: no such {key}"):
        items(data, **{key: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"options": "open('x')"}, "options must be a list"),
        ({"options": "['one']"}, "1 options"),
        ({"answer": "C"}, "its answer 'C' is none of A, B"),
        ({"id": None}, "`id` must be text"),
    ],
)
def test_row_that_is_none_of_mmmu_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EvalError, match=r"V602") as caught:
        mmmu.item_of({**row("Art_1"), **changes})
    assert says in caught.value.line()


def test_damaged_file_and_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "validation-0.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(EvalError, match=r"V602.*cannot be read"):
        items(tmp_path)
    parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "validation-0.parquet")
    with pytest.raises(EvalError, match=r"has no column question, options, answer, question_type"):
        items(tmp_path)


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
