"""A used directory is gone on with under the same recipe, or refused, or moved aside; never mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import FAST, run_train

from vlmpeft import changes, run, workspace
from vlmpeft.config import load_recipe
from vlmpeft.errors import CheckpointError, ConfigError
from vlmpeft.resume import Position

MUST_MATCH = {
    "data.max_length": "255",
    "data.image_mode": "square",
    "data.truncate": "skip",
    "data.held_out": "0.1",
    "data.on_bad_sample": "skip",
    "data.max_bad_fraction": "0.1",
    "data.auto_image_token": "true",
    "data.cache_features": "true",
    "projector.name": "linear",
    "vision.layer": "-2",
    "vision.image_size": "96",
    "language.attention": "eager",
    "run.seed": "1",
    "run.precision": "bf16",
    "init": "other",
    "stages.instruct.batch.size": "8",
    "stages.instruct.batch.micro": "1",
    "stages.instruct.batch.group": "none",
    "stages.instruct.turns": "chat",
    "stages.instruct.system": "Be brief.",
    "stages.instruct.template": "vicuna_v1",
    "stages.instruct.gradient_checkpointing": "true",
    "stages.instruct.optim.lr": "1e-3",
    "stages.instruct.optim.steps": "3",
    "stages.instruct.optim.weight_decay": "0.1",
    "stages.instruct.optim.clip": "1.0",
    "stages.instruct.optim.schedule": "linear",
    "stages.instruct.optim.warmup": "0.5",
    "stages.instruct.optim.betas": "[0.9,0.95]",
    "stages.instruct.tuners.lora.r": "8",
    "stages.instruct.tuners.lora.alpha": "3",
    "stages.instruct.tuners.lora.dropout": "0",
    "stages.instruct.tuners.lora.targets": "minimal",
    "stages.instruct.tuners.lora.lr": "1e-5",
    "stages.instruct.tuners.projector": "null",
    "stages.pretrain": "null",
}
MAY_CHANGE = {
    "run.log_every": "5",
    "run.save_every": "1",
    "run.eval_every": "3",
    "run.keep": "7",
    "run.patience": "2",
    "run.project": "other",
    "run.trackers": "[tensorboard]",
    "eval.batch_size": "3",
    "eval.blank": "false",
    "title": "other",
    "data.workers": "1",
    "data.verify_images": "full",
    "run.device": "auto",
}


@pytest.fixture(scope="module")
def old(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("old")
    workspace.open_directory(directory, load_recipe(str(tiny_recipe), FAST))
    return directory / "recipe.yaml"


@pytest.mark.parametrize("key", list(MUST_MATCH))
def test_changed_key_that_changes_training_is_named(key: str, old: Path, tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), [*FAST, f"{key}={MUST_MATCH[key]}"])
    with pytest.raises(CheckpointError) as caught:
        changes.compare(old, recipe)
    assert caught.value.code == "K210"
    assert f" {key}" in caught.value.message
    assert " -> " in caught.value.message


def test_changed_keys_that_leave_training_alone_pass(old: Path, tiny_recipe: Path) -> None:
    changes.compare(old, load_recipe(str(tiny_recipe), [*FAST, *(f"{k}={v}" for k, v in MAY_CHANGE.items())]))


@pytest.mark.parametrize("named", ["optim.lr", "stages.instruct.optim.lr"])
def test_a_rate_that_is_named_may_change_and_is_told(named: str, old: Path, tiny_recipe: Path) -> None:
    wanted = ["stages.instruct.optim.lr=0.5", f"run.override=[{named}]"]
    found = changes.compare(old, load_recipe(str(tiny_recipe), [*FAST, *wanted]))
    assert found == ["stages.instruct.optim.lr 0.01 -> 0.5"]
    with pytest.raises(CheckpointError, match=r"K210.*instruct\.batch\.size") as caught:
        changes.compare(old, load_recipe(str(tiny_recipe), [*FAST, *wanted, "stages.instruct.batch.size=3"]))
    assert "optim.lr" not in caught.value.message


def test_a_tuners_rate_is_named_in_any_of_its_spellings(old: Path, tiny_recipe: Path) -> None:
    for named in ("lora.lr", "tuners.lora.lr", "stages.instruct.lora.lr", "stages.instruct.tuners.lora.lr"):
        wanted = ["stages.instruct.lora.lr=0.5", f"run.override=[{named}]"]
        assert len(changes.compare(old, load_recipe(str(tiny_recipe), [*FAST, *wanted]))) == 1


def test_what_a_run_is_made_of_cannot_be_overridden(tiny_recipe: Path) -> None:
    for key in ("batch.size", "lora.r", "data.max_length", "optim.name", "run.seed"):
        with pytest.raises(ConfigError, match=r"C102.*run\.override"):
            load_recipe(str(tiny_recipe), [*FAST, f"run.override=[{key}]"])


def test_refusal_on_the_command_line(
    tiny_recipe: Path, old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "assemble", None)
    text = old.read_text()
    assert run_train(tiny_recipe, old.parent, "stages.instruct.optim.lr=0.5") == 5
    assert "error[K210]" in (said := capsys.readouterr().err)
    assert "stages.instruct.optim.lr 0.01 -> 0.5" in said
    assert "run.override=" in said
    assert run_train(tiny_recipe, old.parent, "run.resume=never") == 2
    assert "error[C112]" in capsys.readouterr().err
    assert old.read_text() == text
    assert run_train(tiny_recipe, old.parent, f"run.resume={old.parent}") == 5
    assert "error[K205]" in capsys.readouterr().err


def used(directory: Path, tiny_recipe: Path) -> None:
    (directory / "checkpoints" / "step-3").mkdir(parents=True)
    (directory / "checkpoints" / "step-3" / "weights").write_text("mine")
    (directory / "recipe.yaml").write_text(tiny_recipe.read_text())


def test_overwrite_moves_the_earlier_run_aside(tiny_recipe: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    used(directory, tiny_recipe)
    recipe = load_recipe(str(tiny_recipe), ["run.overwrite=true", "run.seed=1"])
    with workspace.locked(directory):
        workspace.open_directory(directory, recipe)
        assert sorted(p.name for p in directory.iterdir()) == ["recipe.yaml", "run.lock"]
    [moved] = [p for p in tmp_path.iterdir() if p.name.startswith("run.old-")]
    assert (moved / "checkpoints" / "step-3" / "weights").read_text() == "mine"
    assert (moved / "recipe.yaml").read_text() == tiny_recipe.read_text()
    assert load_recipe(str(directory / "recipe.yaml")).run.seed == 1


def test_never_means_no_checkpoint_even_without_a_recipe_beside_it(tiny_recipe: Path, tmp_path: Path) -> None:
    used(tmp_path, tiny_recipe)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(ConfigError, match="C112"):
        workspace.open_directory(tmp_path, load_recipe(str(tiny_recipe), ["run.resume=never"]))


def test_damaged_final_is_not_taken_for_a_finished_run(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"K202.*delete .*final"):
        workspace.open_directory(tmp_path, load_recipe(str(tiny_recipe)))


def test_metrics_are_cut_back_to_the_position(tmp_path: Path) -> None:
    rows = [
        f'{{"stage": "{s}", "step": {n}, "{k}": 1.0}}'
        for s in ("a", "b")
        for n in (1, 2)
        for k in ("loss", "eval_loss")
    ]
    for position, kept in (
        (Position(), 0),
        (Position(0, 1, 1), 2),
        (Position(0, 2, 2, evaluated=False), 3),
        (Position(1, 0, 2), 4),
        (Position(1, 1, 3), 6),
        (Position(2, 0, 4), 8),
    ):
        (tmp_path / "metrics.jsonl").write_text("\n".join([*rows, '{"stage": "b", "lrs": {"a": 1}', "", "7"]))
        workspace.cut_metrics(tmp_path, ["a", "b"], position)
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == rows[:kept]


def test_lost_best_checkpoint_is_forgotten_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    position = Position(0, 4, 4, best_loss=1.0, best_step=2, bad_evals=1, loss=2.0)
    assert workspace.known_best(tmp_path, position) == Position(0, 4, 4, loss=2.0)
    assert "warning: the best checkpoint so far is lost" in capsys.readouterr().out
    assert workspace.known_best(tmp_path, Position(0, 4, 4)) == Position(0, 4, 4)
