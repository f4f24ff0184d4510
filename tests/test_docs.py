"""Every page of docs/ is run: its commands and its Python, in order, in a folder with tiny parts and pictures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_language, write_data
from docs_folder import make_encoder, make_recipe

from vlmpeft.__main__ import COMMANDS, _command
from vlmpeft.config import load_recipe
from vlmpeft.errors import run_command

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of `vlmpeft` for every line of a shell block; a backslash continues a line, # starts a comment."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[:2] == ["python", "-m"] and words[2].startswith("vlmpeft."):
            yield [words[2].removeprefix("vlmpeft."), *words[3:]]
        elif words[0] == "vlmpeft":
            yield words[1:]
        else:
            raise AssertionError(f"not a command of ours, mark its block as text: {line}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take for granted: train.json, images/, questions.jsonl, tiny-encoder/, tiny-llm/, tiny.yaml."""
    write_data(tmp_path)
    (tmp_path / "instruct.json").rename(tmp_path / "train.json")
    (tmp_path / "pope.jsonl").rename(tmp_path / "questions.jsonl")
    make_encoder(tmp_path / "tiny-encoder")
    make_language(tmp_path / "tiny-llm")
    make_recipe(tmp_path / "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_says_runs(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "bash":
            for argv in commands(text):
                status = run_command(_command, argv)
                assert status == 0, f"vlmpeft {shlex.join(argv)} ended with {status}:\n{capsys.readouterr().err}"
        elif file := re.match(r"# file: (\S+)\n", text):  # a block that says which file it is
            (folder / file[1]).write_text(text.split("\n", 1)[1], encoding="utf-8")


def test_the_readme_names_commands_and_keys_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"python -m vlmpeft\.(\S+) ([^`\n]*)", text)
    assert len(named) >= 5
    for command, arguments in named:
        assert command in COMMANDS
        words = [w for w in shlex.split(arguments, comments=True) if "=" in w and "recipe=" not in w]
        if command == "train" and not any(w.startswith("imports=") for w in words):
            load_recipe(re.findall(r"recipe=(\w+)", arguments)[0], words)
