"""`vlmpeft inspect`: samples as the model sees them, totals of the file, and no weights read for it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmpeft import inspect
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.config import load_recipe
from vlmpeft.errors import DataError, run_command
from vlmpeft.preflight import prepare_stages
from vlmpeft.sample_store import Sample
from vlmpeft.sample_text import sample_text, totals_text
from vlmpeft.template import TurnEncoder


def run(*argv: str) -> int:
    return run_command(inspect.main, list(argv))


def sample(tokenizer: Any, *spans: tuple[str, bool]) -> Sample:
    """A sample of an image of three tokens and texts, supervised or not."""
    ids, labels = [IMAGE_TOKEN_ID] * 3, [IGNORE] * 3
    for text, supervised in spans:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, labels = ids + tokens, labels + (tokens if supervised else [IGNORE] * len(tokens))
    return Sample("s", ids, labels, [0] * len(ids), (Path("a.png"),))


def test_supervised_spans_are_marked_and_images_counted(tokenizer: Any) -> None:
    shown = sample(tokenizer, ("What is shown?", False), ("A red square</s>", True), ("\nWhat?", False))
    total = len(shown.input_ids)
    answer = len(tokenizer("A red square</s>")["input_ids"])
    head, text = sample_text(shown, tokenizer, colour=False).split("\n", 1)
    assert head == f'"s": {total} tokens, 1 image, {answer} supervised ({answer / total:.1%})'
    assert text == "<image x3>What is shown?[[A red square</s>]]\nWhat?"
    painted = sample_text(shown, tokenizer, colour=True)
    assert "\x1b[1;32mA red square</s>\x1b[0m" in painted
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == f"{head}\n{text.replace('[[', '').replace(']]', '')}"


def test_text_cannot_reach_the_terminal(tokenizer: Any) -> None:
    text = sample_text(sample(tokenizer, ("\x1b[2J\u202e", True)), tokenizer, colour=False)
    assert text.endswith("[[\\x1b[2J\\u202e]]")


def test_totals_are_those_of_numpy_and_say_what_was_left_out() -> None:
    lengths, supervised, pictures = np.array([10, 30, 20, 40]), np.array([1, 2, 3, 4]), np.array([1, 0, 2, 0])
    text = totals_text(lengths, supervised, pictures, [DataError("D104", "x"), DataError("D102", "y")] * 6)
    assert text.splitlines() == [
        "records 16 = used 4 + skipped 12",
        "with images 2 (3 images), text alone 2",
        "length min 10, median 30, 90 % 40, 99 % 40, max 40",
        "tokens 100, supervised 10 (10.0%)",
        "skipped D102 6, D104 6",
        *["  [D104] x", "  [D102] y"] * 2,
        "  [D104] x",
    ]


def test_recipe_is_shown_as_it_will_train_without_its_weights(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from vlmpeft.build import assemble, empty_bundle

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("weights were read")

    fast = ["vision.image_size=64"]
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
        assert run(f"recipe={tiny_recipe}", *fast, "n=2", "stage=instruct") == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^sample \d+ \"i\d+\": ", said, re.MULTILINE)) == 2
    assert "records 16 = used 16 + skipped 0" in said
    assert "[[Yes<|im_end|>]]" in said
    recipe = load_recipe(str(tiny_recipe), fast)
    import torch

    bundle = assemble(recipe, torch.device("cpu"), torch.float32)
    assert f"<image x{bundle.image_tokens}>" in said
    monkeypatch.setattr(TurnEncoder, "encode", refuse)  # what inspect encoded is what training reads
    stages, _ = prepare_stages(
        empty_bundle(load_recipe(str(tiny_recipe), [*fast, "stages.pretrain=null"])), tmp_path, print
    )
    assert len(stages["instruct"].train) == 16


def test_tokenizer_alone_is_enough(
    language_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"tokenizer={language_dir}", f"data={data_dir / 'instruct.json'}", f"images={data_dir / 'images'}"]
    assert run(*keys, "template=chatml", "image_tokens=7", "n=1", "start=13") == 0
    said = capsys.readouterr().out
    assert said.startswith('sample 13 "t0": ')
    assert run(*keys, "template=chatml", "image_tokens=7", "n=1") == 0
    assert "<image x7>" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for no_color, expected in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        run(*keys, "template=chatml", "image_tokens=7", "n=1")
        assert ("\x1b[" in capsys.readouterr().out) == expected


def test_bad_records_are_told_and_do_not_stop_it(
    language_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "Why?", "answer": "So."}, {"question": "Why?", "answer": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(f"tokenizer={language_dir}", f"data={tmp_path / 'a.jsonl'}", "template=chatml") == 0
    said = capsys.readouterr().out
    assert "records 2 = used 1 + skipped 1" in said
    assert "[D110]" in said


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["tokenizer=x"], 2, "data is not given"),
        (["recipe=quickstart", "stage=instrct"], 2, "did you mean 'instruct'"),
        (["recipe=quickstart"], 2, "data.instruct=FILE"),
        (["recipe=quickstart", "n=x"], 2, "n=x"),
        (["recipe=quickstart", "data.instruct=x.json", "data.images=none"], 2, "images=none: no such folder"),
        (["recipe=quickstart", "data.instrct=x"], 2, "did you mean 'instruct'"),
    ],
    ids=str,
)
def test_mistakes_get_their_line(argv: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == status
    assert says in capsys.readouterr().err
