"""What a newcomer gets wrong on the command line, and the one line that answers: what, where, how to mend it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_language, write_data
from docs_folder import make_encoder, make_recipe

from vlmpeft.__main__ import _command
from vlmpeft.errors import run_command


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    write_data(folder, 4)
    (folder / "instruct.json").rename(folder / "train.json")
    make_encoder(folder / "tiny-encoder")
    make_language(folder / "tiny-llm")
    make_recipe(folder / "tiny.yaml")
    return folder


def _records(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "train.json"
        records = json.loads(file.read_text())
        change(records)
        file.write_text(json.dumps(records))

    return spoil


def _text(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1)) and None


def _bytes(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def _config(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / name
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return spoil


def _nothing(folder: Path) -> None:
    pass


TRAIN = ["train", "recipe=tiny.yaml"]
BAD: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "unknown command": (_nothing, ["trian"], 2, r"no command 'trian'; did you mean 'train'\?"),
    "no recipe": (_nothing, ["train"], 2, r"recipe is not set.*llava_lora"),
    "unknown recipe": (_nothing, ["train", "recipe=llava_lroa"], 2, r"'llava_lroa'; did you mean 'llava_lora'\?"),
    "unknown section": (_nothing, [*TRAIN, "lroa.r=4"], 2, r"no section 'lroa'; did you mean 'lora'\?"),
    "unknown key": (_nothing, [*TRAIN, "lora.dropot=0"], 2, r"lora.*'dropot'; did you mean 'dropout'\?"),
    "flag instead of key": (_nothing, [*TRAIN, "--lora.r"], 2, r"expected key=value, got '--lora.r'"),
    "wrong type": (_nothing, [*TRAIN, "lora.r=four"], 2, r"lora\.r='four'.*integer"),
    "out of range": (_nothing, [*TRAIN, "lora.dropout=1.5"], 2, r"lora\.dropout=1\.5 is out of range"),
    "unknown choice": (_nothing, [*TRAIN, "data.image_mode=stretch"], 2, r"data\.image_mode.*stretch.*pad"),
    "unknown projector": (_nothing, [*TRAIN, "projector=mpl2x_gelu"], 2, r"'mpl2x_gelu'; did you mean 'mlp2x_gelu'\?"),
    "projector option": (_nothing, [*TRAIN, "projector.dept=3"], 2, r"projector 'mlp2x_gelu' has no option 'dept'"),
    "unknown template": (_nothing, [*TRAIN, "template=vicuna"], 4, r"no template 'vicuna'; did you mean 'vicuna_v1'\?"),
    "unknown tuner kind": (_nothing, [*TRAIN, "tuners.a.kind=lorra"], 2, r"'lorra'; did you mean 'lora'\?"),
    "unknown target": (_nothing, [*TRAIN, "lora.targets=[q_prj]"], 4, r"'q_prj' in language; did you mean 'q_proj'\?"),
    "encoder without source": (_nothing, [*TRAIN, "vision=clip"], 4, r"'clip' names no source.*timm:NAME"),
    "unknown timm model": (_nothing, [*TRAIN, "vision=timm:vit_bse"], 4, r"timm has no model 'vit_bse'; did you mean"),
    "layer out of range": (_nothing, [*TRAIN, "vision.layer=-9"], 4, r"vision\.layer=-9"),
    "grid it cannot take": (
        _nothing, [*TRAIN, "projector=pixel_shuffle", "projector.factor=9"], 4, r"hf:tiny-encoder.*4x4.*pixel_shuffle",
    ),
    "no data file": (_nothing, [*TRAIN, "data.instruct=trian.json"], 2, r"data\.instruct=trian\.json: no such file"),
    "no image folder": (_nothing, [*TRAIN, "data.images=imgs"], 2, r"imgs"),
    "missing image": (lambda f: (f / "images/001.png").unlink(), TRAIN, 3, r'train\.json record 1 id="i1".*001\.png'),
    "image of another case": (
        lambda f: (f / "images/001.png").rename(f / "images/001.PNG") and None, TRAIN, 3, r"001\.png.*001\.PNG",
    ),
    "empty image": (_bytes("images/001.png", b""), TRAIN, 3, r"D104.*001\.png"),
    "a web page as image": (_bytes("images/001.png", b"<html>not found</html>"), TRAIN, 3, r"D104.*001\.png"),
    "broken JSON": (_text("train.json", '"id": "i1"', '"id" "i1"'), TRAIN, 3, r"D101.*train\.json line 1 column \d+"),
    "not a list": (_bytes("train.json", b'"hello"'), TRAIN, 3, r"D101.*train\.json"),
    "two marks, one image": (
        _records(lambda r: r[1]["conversations"][0].update(value="<image><image>What?")), TRAIN, 3,
        r'D107.*record 1 id="i1"',
    ),
    "a mark, no image": (_records(lambda r: r[1].pop("image")), TRAIN, 3, r'D108.*record 1 id="i1"'),
    "unknown role": (
        _records(lambda r: r[1]["conversations"][0].update({"from": "robot"})), TRAIN, 3, r'record 1 id="i1".*robot',
    ),
    "empty answer": (
        _records(lambda r: r[1]["conversations"][1].update(value=" ")), TRAIN, 3, r'record 1 id="i1".*empty|D110',
    ),
    "no conversations": (_records(lambda r: r[1].pop("conversations")), TRAIN, 3, r'record 1 id="i1"'),
    "a template the tokenizer lacks": (
        _config("tiny-llm/tokenizer_config.json", chat_template=None),
        [*TRAIN, "template=tokenizer"], 4, r"M510.*no chat template.*template=",
    ),
    "no such language model": (_nothing, [*TRAIN, "language=tiny-lm"], 6, r"tiny-lm"),
    "a folder that is no encoder": (_nothing, [*TRAIN, "vision=hf:images"], 4, r"images"),
    "no model directory": (_nothing, ["generate", "model=runs/none", "prompt=Hi"], 5, r"runs/none"),
    "no question file": (
        _nothing, ["eval.pope", "questions=q.jsonl", "answers=a.jsonl"], 2, r"no file 'q\.jsonl'",
    ),
    "path that leaves the folder": (
        _records(lambda r: r[1].update(image="../tiny.yaml")), TRAIN, 3, r'D120.*record 1 id="i1"|record 1.*D120',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_line_says_what_where_and_how(
    name: str, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, argv, status, message = BAD[name]
    folder = tmp_path / "mine"
    shutil.copytree(clean, folder)
    if name == "a template the tokenizer lacks":
        (folder / "tiny-llm" / "chat_template.jinja").unlink(missing_ok=True)
    spoil(folder)
    monkeypatch.chdir(folder)
    assert run_command(_command, argv) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if "error[" in line]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in lines[0]
    assert not (folder / "runs" / "tiny" / "checkpoints").exists()  # nothing was trained on it
