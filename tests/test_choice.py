"""Multiple choice on a user's own rows: places of images, parsers, and what the shared command line does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_bundle import FakeBundle
from PIL import Image

import vlmpeft
from vlmpeft.errors import ConfigError, DataError, EvalError, run_command
from vlmpeft.eval import choice
from vlmpeft.eval.choices import lettered, literal, option_lines
from vlmpeft.eval.choices_run import read_answers

COLOURS = {"r.png": (255, 0, 0), "g.png": (0, 255, 0)}
ROWS: list[dict[str, Any]] = [
    {"id": "m1", "image": "r.png", "question": "Colour? <image 1>", "options": ["red", "blue"], "answer": "A",
     "question_type": "multiple-choice", "category": "warm"},
    {"id": "m2", "image": "g.png", "question": "Colour?", "options": ["red", "green"], "answer": "B",
     "category": "cold"},
    {"id": 3, "image": ["r.png", "g.png"], "question": "Which of <image 2> and <image 1>?", "options": ["1", "2", "3"],
     "answer": "C", "category": "cold"},
    {"id": "m4", "question": "One plus <image>?", "options": ["x", "y"], "answer": "B", "category": "none"},
]  # fmt: skip
SAID = {"m1": "A", "m2": "It is B.", "3": "no idea", "m4": "x"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 3), colour).save(tmp_path / "images" / name)
    path = tmp_path / "choice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(data: Path, **changes: str) -> list[Any]:
    arguments = {"data": str(data), **choice.BENCHMARK.defaults, "images": str(data.parent / "images"), **changes}
    return choice.read_items(arguments, True)


def test_images_stand_where_they_are_named_and_else_in_front(data: Path) -> None:
    one, unnamed, two, none = read(data)
    assert one.prompt.startswith("Colour? <image>\nA. red\nB. blue\nAnswer with the option's letter")
    assert unnamed.prompt.startswith("<image>\nColour?\n")
    assert two.prompt.startswith("Which of <image> and <image>?\n")
    assert [path.name for path in two.images] == ["g.png", "r.png"]
    assert none.prompt.startswith(r"One plus \<image>?")
    assert none.images == ()


def test_place_of_an_image_that_the_row_has_not_stays_text() -> None:
    item = choice.item_of({**ROWS[1], "question": "<image 2> <image 0> <image 1>"}, [Path("g.png")])
    assert item.prompt.startswith("<image 2> <image 0> <image>\n")


@pytest.mark.parametrize(
    ("parser", "correct", "unparsable", "by_chance"),
    [("vlmevalkit", 2, 1, 0), ("strict", 1, 3, 0), ("scienceqa", 1, 3, 0)],
)
def test_each_parser_reads_its_own_way(parser: str, correct: int, unparsable: int, by_chance: int) -> None:
    metrics = choice.score(SAID, ROWS, parser)
    assert (metrics["correct"], metrics["unparsable"], metrics["by_chance"]) == (correct, unparsable, by_chance)


def test_mmmu_parser_decides_by_chance_and_the_score_without_it_is_given_too() -> None:
    metrics = choice.score(SAID, ROWS, "mmmu")
    assert (metrics["unparsable"], metrics["by_chance"]) == (2, 2)  # "no idea" and "x"
    assert metrics["accuracy_without_chance"] == 0.5
    assert metrics["accuracy"] >= 0.5


def test_categories_are_scored_apart() -> None:
    metrics = choice.score(SAID, ROWS)
    hits = {name: (m["correct"], m["n"]) for name, m in metrics["categories"].items()}
    assert hits == {"cold": (1, 2), "none": (0, 1), "warm": (1, 1)}
    assert metrics["accuracy_ci95"][0] <= metrics["accuracy"] <= metrics["accuracy_ci95"][1]


def test_no_questions_give_zero() -> None:
    assert choice.score({}, [])["accuracy"] == 0.0


def test_order_changes_nothing_and_a_mismatch_is_refused() -> None:
    expected = choice.score(SAID, ROWS, "mmmu")
    draw = random.Random(0)
    rows = [{"id": key, "response": text} for key, text in SAID.items()]
    for _ in range(10):
        assert choice.score(draw.sample(rows, 4), draw.sample(ROWS, 4), "mmmu") == expected
    for answers, says in (
        (rows[1:], "1 missing answers: m1"),
        ([*rows, {"id": "m9", "text": "A"}], "1 extra answers: m9"),
        ([*rows, rows[0]], "1 repeated answers: m1"),
        ([{"text": "A"}] * 4, "nothing is joined by position"),
    ):
        with pytest.raises(EvalError, match=f"V601.*{says}"):
            choice.score(answers, ROWS)
    with pytest.raises(EvalError, match=r"V601.*1 repeated questions: m1"):
        choice.score(SAID, [*ROWS, ROWS[0]])
    with pytest.raises(EvalError, match=r"V602.*the answer m1 has no text, but 3"):
        choice.score({**SAID, "m1": 3}, ROWS)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"options": "red, blue"}, "options must be a list"),
        ({"options": ["red"]}, "1 options"),
        ({"options": ["x"] * 27}, "27 options"),
        ({"answer": "C"}, "answer must be one of A, B, got 'C'"),
        ({"answer": None}, "answer must be one of A, B, got None"),
        ({"id": None}, "`id` must be an integer or text"),
    ],
)
def test_bad_row_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EvalError, match="V602") as caught:
        choice.item_of({**ROWS[0], **changes})
    assert says in caught.value.line()


def test_missing_image_and_missing_folder_are_refused_before_a_model_loads(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.parent / "images" / "g.png").unlink()
    with pytest.raises(DataError, match="D103"):
        read(data)
    with pytest.raises(ConfigError, match="images is not given"):
        read(data, images="")
    assert run_command(choice.main, ["model=none", f"data={data}", f"out={data.parent}", "ablate=blnk"]) == 2
    assert "no ablation 'blnk'" in capsys.readouterr().err


def test_helpers_letter_quote_and_list_options() -> None:
    assert lettered(["x", 2], "q") == {"A": "x", "B": "2"}
    assert option_lines({"A": "x", "B": "y"}, "({}) {}") == "(A) x\n(B) y"
    assert literal("an <image> and <image 1>") == r"an \<image> and <image 1>"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(SAID),
        json.dumps([{"id": key, "text": text} for key, text in SAID.items()]),
        "".join(json.dumps({"question_id": key, "answer": text}) + "\n" for key, text in SAID.items()),
    ],
)
def test_answers_may_be_an_object_a_list_or_lines(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert choice.score(read_answers(tmp_path / "a.json"), ROWS) == choice.score(SAID, ROWS)


@pytest.mark.parametrize(("text", "code"), [("[1, 2]", "V602"), ('{"a": "A", "a": "B"}', "V601"), ("{", "V602")])
def test_bad_file_of_answers_is_refused(text: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(EvalError, match=code):
        read_answers(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="no file"):
        read_answers(tmp_path / "absent.json")


def test_scoring_imports_no_torch(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAID))
    code = (
        "import sys; from vlmpeft.eval import choice, iconqa, mmbench, scienceqa; "
        f"choice.main(['data={data}', 'answers={tmp_path}/a.json']); "
        "heavy = {'torch', 'transformers', 'PIL', 'numpy', 'tqdm'} & set(sys.modules); sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["correct"] == 2


def asked(data: Path, name: str, *more: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    out = data.parent / name
    argv = ["model=m", f"data={data}", f"images={data.parent / 'images'}", f"out={out}", *more]
    assert run_command(choice.main, argv) == 0
    lines = (out / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((out / "metrics.json").read_text())


def test_command_asks_in_batches_and_compares_two_runs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = FakeBundle({"One plus": " B\n"}, default="A")
    monkeypatch.setattr(vlmpeft, "load", lambda model, device: bundle)
    answers, metrics = asked(data, "first", "batch_size=3", "max_new_tokens=5")
    assert bundle.asked == {"max_new_tokens": 5, "batch_size": 3, "contrast": None}
    assert [(a["question_id"], a["text"], a["parsed"], a["correct"]) for a in answers] == [
        ("m1", "A", "A", True), ("m2", "A", "A", False), ("3", "A", "A", False), ("m4", "B", "B", True),
    ]  # fmt: skip
    assert metrics["accuracy"] == choice.score(answers, ROWS)["accuracy"] == 0.5
    shown = next(pictures for pictures in bundle.shown if len(pictures) == 2)
    assert [pixel for _, pixel in shown] == [COLOURS["g.png"], COLOURS["r.png"]]
    bundle.default = "B"
    compared = asked(data, "second", f"compare={data.parent / 'first'}")[1]["compare"]
    assert {k: compared[k] for k in ("accuracy", "better", "worse", "equal")} == {
        "accuracy": 0.5, "better": 1, "worse": 1, "equal": 2,
    }  # fmt: skip


def test_ablated_pictures_are_shown_instead(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = FakeBundle()
    monkeypatch.setattr(vlmpeft, "load", lambda model, device: bundle)
    _, metrics = asked(data, "blank", "ablate=blank")
    assert metrics["ablate"] == "blank"
    assert {s for pictures in bundle.shown for s in pictures} == {((4, 3), (122, 116, 104))}
    bundle.prompts, bundle.shown = [], []
    asked(data, "shuffled", "ablate=shuffle")
    pixels = {prompt: [pixel for _, pixel in of] for prompt, of in zip(bundle.prompts, bundle.shown, strict=True)}
    starts = ("Colour? <image>", "<image>\nColour?")
    firsts = [next(seen for prompt, seen in pixels.items() if prompt.startswith(start)) for start in starts]
    assert firsts == [[COLOURS["g.png"]], [COLOURS["r.png"]]]
