"""The command line: help, unknown commands, exit statuses, and imports that stay light."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vlmpeft import __main__, train
from vlmpeft.config import load_recipe, recipe_names
from vlmpeft.errors import VlmpeftError, run_command

Captured = pytest.CaptureFixture[str]


def vlmpeft(*arguments: str) -> int:
    """Run `vlmpeft ...` inside this process."""
    return run_command(__main__._command, arguments)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(arguments: Sequence[str], capsys: Captured) -> None:
    assert vlmpeft(*arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: vlmpeft <command>")
    for command in ("train", "generate", "scenes", "eval.pope", "eval.short"):
        assert f"\n  {command} " in out
    assert err == ""


def test_every_listed_command_can_be_run(capsys: Captured) -> None:
    for command in __main__.COMMANDS:
        with contextlib.suppress(SystemExit):
            assert vlmpeft(command, "--help") == 0
        assert "=" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean 'train'?"), ("zzz", "(known: adapters, ")])
def test_an_unknown_command_gets_the_nearest(name: str, hint: str, capsys: Captured) -> None:
    assert vlmpeft(name, "recipe=x") == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"vlmpeft: error[C100] no command '{name}'")
    assert hint in err
    assert err.count("\n") == 1
    assert out == ""


def test_train_help_lists_recipes_and_every_key_with_its_default(capsys: Captured) -> None:
    assert vlmpeft("train", "--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipe_names())
    for line in (
        "vision.name=...  required", "vision.layer=-1", "vision.weights_by=name  of name|order",
        "language.attention=auto",
        "projector.name=mlp2x_gelu", "projector.grid=12  with projector.name=ldpv2", "data.max_length=2048",
        "data.image_mode=pad  of pad|square|anyres", "data.workers=2", "eval.blank=true", "run.trackers=[]",
        "init=null",
        "eval.suffix=\\nAnswer the question using a single word or phrase.", "template=vicuna_v1",
        "optim.betas=[0.9,0.999]", "optim.clip=null", "batch.micro=16", "lora.targets=all-linear",
        "full.part=projector",
    ):  # fmt: skip
        assert f"  {line}\n" in out


def test_every_key_of_the_help_can_be_set() -> None:
    """A key that the loader does not know is a lie; so is a default that it would not take."""
    given = {"vision.name": "timm:test_vit", "language.name": "x"}
    for line in train.settings():
        key, _, shown = line.partition("=")
        value = given.get(key) or shown.split("  ")[0]
        recipe = ["projector.name=" + shown.rpartition("=")[2]] if "  with projector.name=" in shown else []
        try:
            load_recipe("llava_lora", [*recipe, f"{key}={value}"])
        except VlmpeftError as error:
            pytest.fail(f"{key}={value}: {error}")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "error[C106] recipe is not set"),
        (["recipe=quickstrat"], 2, "did you mean 'quickstart'?"),
        (["recipe=nowhere.yaml"], 2, "error[C103] no recipe file nowhere.yaml"),
        (["recipe=quickstart", "optim.lr=1e-3"], 2, "write stages.pretrain.optim.lr"),
        (["recipe=quickstart", "stages.pretrain.optim.lr=fast"], 2, "error[C102]"),
        (["recipe=quickstart", "run.dir={tmp}/run"], 2, "data.pretrain"),
        (["recipe=quickstart", "data.pretrain={tmp}/none.json", "run.dir={tmp}/run"], 2, "data.pretrain"),
        (["--recipe", "quickstart"], 2, "error[C1"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_a_status(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: Captured
) -> None:
    assert vlmpeft("train", *[a.format(tmp=tmp_path) for a in arguments]) == status
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err + out
    assert not (tmp_path / "run").exists()


def test_show_prints_a_recipe_that_loads_to_the_same(tmp_path: Path, capsys: Captured) -> None:
    assert vlmpeft("train", "recipe=llava_lora", "optim.lr=1e-3", "--show") == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "shown.yaml")) == load_recipe("llava_lora", ["optim.lr=1e-3"])


def test_debug_prints_the_traceback_too(capsys: Captured) -> None:
    assert vlmpeft("train", "recipe=quickstrat", "--debug") == 2
    err = capsys.readouterr().err
    assert "vlmpeft: error[C103]" in err
    assert "Traceback (most recent call last)" in err


def test_commands_run_as_modules_of_a_fresh_process() -> None:
    found = python("-m", "vlmpeft", "trian")
    assert (found.returncode, found.stdout) == (2, "")
    assert "did you mean 'train'?" in found.stderr
    assert python("-m", "vlmpeft.generate", "--help").returncode == 0


def test_import_vlmpeft_and_its_help_load_no_torch() -> None:
    code = (
        "import sys, vlmpeft, vlmpeft.__main__, vlmpeft.generate, vlmpeft.scenes;"
        "import vlmpeft.eval.pope, vlmpeft.eval.short;"
        "heavy = {'torch', 'transformers', 'timm', 'omegaconf', 'accelerate'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    found = python("-c", code)
    assert found.returncode == 0, found.stderr
