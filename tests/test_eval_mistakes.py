"""What one gets wrong when one types an evaluation, and the one line that answers: what, where, how to mend it."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
from eval_questions import QUESTIONS, write_pictures

import vlmpeft
from vlmpeft.errors import run_command
from vlmpeft.eval.rows import write_rows

SAID = [{"question_id": q["question_id"], "text": "Yes"} for q in QUESTIONS]
CHOICE = {"id": "c1", "image": "a.png", "question": "Which?", "options": ["cat", "dog"], "answer": "A"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the pages of docs/ have them, and others that one takes for them."""
    folder = tmp_path_factory.mktemp("clean")
    write_pictures(folder / "pictures" / "images")
    write_rows(folder / "q.jsonl", QUESTIONS)
    write_rows(folder / "said.jsonl", SAID)
    write_rows(folder / "named.jsonl", [{"question_id": q["question_id"], "reply": "Yes"} for q in QUESTIONS])
    write_rows(folder / "no_label.jsonl", [{k: v for k, v in q.items() if k != "label"} for q in QUESTIONS])
    write_rows(folder / "title.jsonl", [{**QUESTIONS[0], "label": "Yes"}])
    write_rows(folder / "one_image.jsonl", [{**QUESTIONS[0], "image": "aa.png"}, *QUESTIONS[1:]])
    write_rows(folder / "c.jsonl", [CHOICE])
    (folder / "other").mkdir()
    write_rows(folder / "other" / "answers.jsonl", SAID[:1])
    (folder / "list.json").write_text(json.dumps(SAID))
    (folder / "empty.jsonl").write_text("")
    (folder / "bytes.tsv").write_bytes(b"\xff\xfe\x00index")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    shutil.copytree(folder / "pictures" / "images", folder / "broken")
    (folder / "broken" / "sub" / "c.png").write_bytes(b"no picture")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "run" / "final").mkdir(parents=True)
    (folder / "run" / "final" / "manifest.json").write_text("{}")
    return folder


MODEL = "eval.pope model=run/final questions=q.jsonl images=pictures/images out=out"
GIVEN = "eval.pope questions=q.jsonl answers=said.jsonl"
MISTAKES = {  # what is typed: exit status, what the line says
    # the model
    MODEL.replace("run/final", "nowhere"): (5, "[K202] nowhere is no complete model directory: there is no such"),
    MODEL.replace("run/final", "file"): (5, "[K202] file is no complete model directory: it is a file. Fix: name"),
    MODEL.replace("run/final", "run"): (5, "manifest.json is missing. Fix: did you mean run/final?"),
    MODEL.replace("run/final", "hf"): (5, "Fix: a model of transformers is asked as hf:hf"),
    MODEL.replace("run/final", "hf:"): (2, "[C102] model=hf: names no model. Fix: write model=hf:DIR_OR_ID."),
    # its pictures
    MODEL.replace("pictures/images", "nowhere"): (2, "[C102] images=nowhere: no such folder. Fix: name the folder"),
    MODEL.replace("pictures/images", "pictures"): (3, "(3 images are missing). Fix: did you mean pictures/images?"),
    MODEL.replace("pictures/images", "empty"): (3, "[D103] no image 'a.png' in empty (0 files there) (3 images"),
    MODEL.replace("q.jsonl", "one_image.jsonl"): (3, "did you mean 'a.png'? Fix: put it there, or mend its name."),
    MODEL.replace("pictures/images", "broken"): (3, 'sub/c.png" is no readable JPEG'),
    # its output folder and options
    MODEL.replace("out=out", "out=file"): (2, "[C111] out=file: it is a file. Fix: choose a folder"),
    MODEL + " --batch_size 4": (2, "expected key=value, got '--batch_size'. Fix: write batch_size=VALUE."),
    MODEL + " compare=empty": (2, "[C102] no file 'empty/answers.jsonl'."),
    # the questions
    GIVEN.replace("q.jsonl", "no_label.jsonl"): (
        8,
        "no_label.jsonl line 1: no key 'label' (known: image, question_id, text). Fix: every row has ",
    ),
    GIVEN.replace("q.jsonl", "title.jsonl"): (8, "label must be 'yes' or 'no', got 'Yes'. Fix: write yes or no, in"),
    GIVEN.replace("q.jsonl", "list.json"): (8, "[V602] list.json line 1: expected an object, got list. Fix: every row"),
    GIVEN.replace("q.jsonl", "empty.jsonl"): (8, "[V602] empty.jsonl has no rows. Fix: check that it is the file"),
    # the answers
    GIVEN.replace("said.jsonl", "empty"): (2, "[C102] 'empty' is a folder. Fix: name a file in it."),
    GIVEN.replace("said.jsonl", "empty.jsonl"): (8, "[V602] empty.jsonl has no rows. Fix: check that it is the file"),
    GIVEN.replace("said.jsonl", "named.jsonl"): (
        8,
        "[V602] the answer 5 has no text, but None (its keys: question_id, reply). Fix: give `text` or `answer`.",
    ),
    GIVEN.replace("said.jsonl", "q.jsonl"): (8, "[V601] the answers are the questions themselves. Fix: give the file"),
    GIVEN + " compare=other": (
        8,
        "[V601] other/answers.jsonl: 4 questions and 1 answers do not match: 3 missing answers",
    ),
    GIVEN + " out=out": (2, "[C101] out is given beside answers: they are scored as they are, and the figures printed"),
    "eval.choice data=c.jsonl answers=c.jsonl": (8, "row 1 of the answers has options: these are the questions. Fix:"),
    # files of other benchmarks
    "eval.mmmu data=nowhere answers=said.jsonl": (
        2,
        "data=nowhere: no such file or folder. Fix: name a parquet file",
    ),
    "eval.mmbench data=empty answers=said.jsonl": (2, "[C102] 'empty' is a folder. Fix: name a file in it."),
    "eval.mmbench data=bytes.tsv answers=said.jsonl": (8, "bytes.tsv: no text in UTF-8. Fix: give MMBench's TSV file."),
    "eval.gqa questions=list.json answers=said.jsonl": (8, "[V602] list.json: not the official layout. Fix: give the"),
    "eval.mmvet questions=list.json grades=list.json": (8, "[V602] list.json: not the official layout. Fix: give mm-v"),
    "eval.vqa questions=q.jsonl answers=said.jsonl": (8, "answers must be a list of texts, got None. Fix: give what"),
    "eval.caption questions=q.jsonl answers=said.jsonl": (8, "references must be a list of texts, got None. Fix: give"),
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_one_line_says_what_where_and_how_to_mend_it(
    typed: str, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for entry in clean.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    status, says = MISTAKES[typed]
    command, *arguments = typed.split()
    assert run_command(importlib.import_module(f"vlmpeft.{command}").main, arguments) == status
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("vlmpeft: error[")
    assert error.count("\n") == 1
    assert says in error


def test_pictures_are_checked_before_the_model_is_loaded(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vlmpeft, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(clean)
    write_rows(tmp_path / "c.jsonl", [{**CHOICE, "image": "sub/c.png"}])
    for command, given in (("pope", "questions=q.jsonl"), ("choice", f"data={tmp_path / 'c.jsonl'}")):
        main = importlib.import_module(f"vlmpeft.eval.{command}").main
        assert run_command(main, ["model=run/final", given, "images=broken", f"out={tmp_path / 'out'}"]) == 3
        assert "error[D104]" in capsys.readouterr().err
