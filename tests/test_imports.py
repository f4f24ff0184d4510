"""A newcomer adds a projector in one file of their own and trains with it, through the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmpeft import train
from vlmpeft.config import load_recipe, to_yaml
from vlmpeft.errors import ConfigError

MINE = """from torch import nn
from vlmpeft.projectors import PROJECTORS


@PROJECTORS.register("mine")
class Mine(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(in_dim, out_dim), gain

    def forward(self, features):
        return self.linear(features) * self.gain

    def num_tokens(self, n: int) -> int:
        return n
"""
FIXTURES = Path(__file__).parent / "fixtures"
MODELS = [f"language={FIXTURES / 'mobilellama-1.4b'}", f"vision=hf:{FIXTURES / 'clip-vit-l-336'}", "run.dry_run=true"]
PACKAGE = Path(__file__).parents[1]


def test_the_installed_command_finds_a_projector_in_one_file_of_the_users_own(tmp_path: Path) -> None:
    assert len([line for line in MINE.splitlines() if line]) <= 15
    (tmp_path / "my_module.py").write_text(MINE)
    script = "import sys, vlmpeft.__main__ as m; sys.exit(m.main())"  # with -P the current folder is not on sys.path
    options = ["recipe=llava_pretrain", "imports=[my_module]", "projector=mine", "projector.gain=0.5", "--show"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "train", *options],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PACKAGE)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "projector:\n  name: mine\n  gain: 0.5\n" in done.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_newcomers_projector_is_built_into_the_model(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "my_own_module.py").write_text(MINE)
    options = ["recipe=llava_pretrain", "imports=[my_own_module]", "projector=mine", *MODELS]
    assert train.main(options) == 0
    assert f"{1024 * 2048 + 2048:,} of" in capsys.readouterr().out


def test_a_recipe_file_may_name_its_modules_and_keeps_them_when_saved(folder: Path) -> None:
    (folder / "own_projector_a.py").write_text(MINE.replace('"mine"', '"mine_a"'))
    (folder / "mine.yaml").write_text(
        "base: llava_pretrain\nimports: [own_projector_a]\nprojector: {name: mine_a, gain: 2}\n"
    )
    recipe = load_recipe("mine.yaml")
    assert (recipe.imports, recipe.projector.options) == (("own_projector_a",), {"gain": 2.0})
    (folder / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe("again.yaml") == recipe


def test_a_tuner_of_the_users_own_has_a_section_of_its_own(folder: Path) -> None:
    (folder / "own_tuner.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from vlmpeft.tuners import TUNERS\n\n\n"
        "@TUNERS.register('bias_only')\n"
        "@dataclass(frozen=True)\n"
        "class BiasOnly:\n"
        "    kind: ClassVar[str] = 'bias_only'\n"
        "    part: str = 'language'\n"
        "    lr: float | None = None\n\n"
        "    def apply(self, model, parts):\n"
        "        return {n: p for n, p in model.named_parameters() if n.endswith('bias')}\n"
    )
    recipe = load_recipe("llava_lora", ["imports=[own_tuner]", "bias_only.lr=1e-3", "lora=null"])
    assert {t.kind for t in recipe.stages["instruct"].tuners.values()} == {"bias_only", "full"}


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("no_such_module_here", None, "C109"),
        ("broken_a", "import no_such_package", "C109"),
        ("broken_b", "def (", "C109"),
        ("broken_c", "1 / 0", "C109"),
        ("taken", MINE.replace('"mine"', '"linear"'), "C120"),
    ],
)
def test_a_module_that_does_not_load_is_answered_in_one_line(
    folder: Path, name: str, text: str | None, code: str
) -> None:
    if text is not None:
        (folder / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe("llava_pretrain", [f"imports=[{name}]"])
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    assert code == "C120" or f"cannot import '{name}'" in str(caught.value)


def test_options_of_a_projector_are_checked_by_their_annotations(folder: Path) -> None:
    (folder / "own_projector_b.py").write_text(MINE.replace('"mine"', '"mine_b"'))
    known = ["imports=[own_projector_b]", "projector=mine_b"]
    assert load_recipe("llava_pretrain", [*known, "projector.gain=1e-2"]).projector.options == {"gain": 0.01}
    with pytest.raises(ConfigError, match=r"C102.*projector\.gain='much' is not a number"):
        load_recipe("llava_pretrain", [*known, "projector.gain=much"])
    with pytest.raises(ConfigError, match=r"C104.*no option 'gian'; did you mean 'gain'"):
        load_recipe("llava_pretrain", [*known, "projector.gian=1"])
