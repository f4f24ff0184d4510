"""A run that is killed, stopped or found finished goes on as if nothing had happened: bit for bit."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import in_child, kill_at_write, metrics, outcome, run_train, signal_at, tensors

from vlmpeft import checkpoint, forward, fs, loop, run
from vlmpeft.resume import checkpoints

# LoRA dropout, modality groups and accumulation are in the recipe; best checkpoints and early stopping come on top.
EVALUATED = ("data.held_out=0.25", "run.eval_every=2", "run.save_every=3")


def train(recipe: Path, directory: Path, *more: str) -> int:
    return run_train(recipe, directory, *EVALUATED, *more)


@pytest.fixture(scope="module")
def straight(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert train(tiny_recipe, directory) == 0
    return directory


@pytest.fixture(scope="module")
def killed(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in its second stage, between two saves."""
    directory = tmp_path_factory.mktemp("killed") / "run"

    def work() -> int:
        signal_at(loop.StageTrainer, "_gradients", 10)
        return train(tiny_recipe, directory)

    assert in_child(work) == -signal.SIGKILL
    return directory


def test_two_straight_runs_are_equal(tiny_recipe: Path, straight: Path, tmp_path: Path) -> None:
    assert train(tiny_recipe, tmp_path) == 0
    assert outcome(tmp_path) == outcome(straight)


KILLS: dict[str, Callable[[Path], None]] = {  # in the order of a run: each hits what the one before it left
    "before the first save": lambda _: signal_at(loop.StageTrainer, "_gradients", 1, after=True),
    "mid-epoch, mid-accumulation": lambda _: signal_at(loop.Accelerator, "backward", 4),
    "before a held-out evaluation": lambda _: signal_at(loop.StageTrainer, "held_out_loss", 1),
    "while files of a checkpoint are written": lambda d: kill_at_write(d / "checkpoints", 20),
    "after an update, before its log line": lambda _: signal_at(loop.StageTrainer, "_log", 5),
    "at the stage boundary, before its checkpoint": lambda _: signal_at(run, "save_checkpoint", 1),
    "at the stage boundary, after its checkpoint": lambda _: signal_at(run, "save_checkpoint", 1, after=True),
    "in stage 2, mid-accumulation": lambda _: signal_at(loop.Accelerator, "backward", 4),
    "while an old checkpoint is removed": lambda _: signal_at(fs.shutil, "rmtree", 2),
    "after the last stage, before its checkpoint": lambda _: signal_at(run, "save_checkpoint", 1),
    "while the final model is written": lambda d: kill_at_write(d / ".tmp-final", 5),
    "before the report": lambda _: signal_at(run, "write_report", 1),
}


def test_kill_9_anywhere_loses_nothing(tiny_recipe: Path, straight: Path, tmp_path: Path) -> None:
    for where, arm in KILLS.items():

        def work(arm: Callable[[Path], None] = arm) -> int:
            arm(tmp_path)
            return train(tiny_recipe, tmp_path)

        assert in_child(work) == -signal.SIGKILL, where
    assert train(tiny_recipe, tmp_path) == 0
    assert outcome(tmp_path) == outcome(straight)
    assert [p.name for p in tmp_path.rglob(".*")] == []
    assert (tmp_path / "report.html").is_file()


TERMS: dict[str, tuple[Callable[[], None], bool]] = {  # what sends SIGTERM, whether there is a checkpoint afterwards
    "while the model loads": (lambda: signal_at(run, "assemble", 1, signal.SIGTERM), False),
    "after the data is checked": (lambda: signal_at(run, "prepare_stages", 1, signal.SIGTERM, after=True), False),
    "mid-accumulation": (lambda: signal_at(loop.Accelerator, "backward", 3, signal.SIGTERM), True),
    "in the evaluation still due": (lambda: signal_at(forward, "load_batches", 1, signal.SIGTERM), True),
    "while a checkpoint is written": (lambda: signal_at(checkpoint, "write_manifest", 1, signal.SIGTERM), True),
    "in the last step of a stage": (lambda: signal_at(loop.StageTrainer, "_log", 4, signal.SIGTERM), True),
    "at the stage boundary": (lambda: signal_at(run, "save_checkpoint", 1, signal.SIGTERM), True),
    "in stage 2": (lambda: signal_at(loop.Accelerator, "backward", 2, signal.SIGTERM), True),
    "at the end of the last stage": (lambda: signal_at(run, "save_checkpoint", 1, signal.SIGTERM), True),
}


def test_sigterm_anywhere_exits_143_and_loses_nothing(tiny_recipe: Path, straight: Path, tmp_path: Path) -> None:
    logged = 0
    for where, (send, saved) in TERMS.items():

        def work(send: Callable[[], None] = send) -> int:
            send()
            return train(tiny_recipe, tmp_path)

        assert in_child(work) == 143, where
        assert bool(checkpoints(tmp_path)) == saved, where
        assert not (tmp_path / "run.lock").exists(), where
        rows = metrics(tmp_path) if saved else []
        assert len(rows) >= logged, where  # what was logged was saved with it: the file never has to be cut
        assert rows == metrics(straight)[: len(rows)], where
        logged = len(rows)
    assert train(tiny_recipe, tmp_path) == 0
    assert outcome(tmp_path) == outcome(straight)


def test_second_sigterm_ends_the_process_at_once(tiny_recipe: Path, tmp_path: Path) -> None:
    def work() -> int:
        signal_at(loop.Accelerator, "backward", 3, signal.SIGTERM)
        signal_at(loop.StageTrainer, "_save", 1, signal.SIGTERM)
        return train(tiny_recipe, tmp_path)

    assert in_child(work) == -signal.SIGTERM


def test_finished_run_is_left_alone(
    tiny_recipe: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(straight, tmp_path / "run"))

    def digests() -> dict[str, tuple[str, int]]:
        files = [p for p in directory.rglob("*") if p.is_file()]
        return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}

    before = digests()
    assert train(tiny_recipe, directory) == 0
    assert "already complete" in capsys.readouterr().out
    assert digests() == before


def test_finished_run_without_its_report_gets_it(tiny_recipe: Path, straight: Path, tmp_path: Path) -> None:
    """A kill may fall between the final model and the report."""
    directory = Path(shutil.copytree(straight, tmp_path / "run"))
    (directory / "report.html").unlink()
    assert train(tiny_recipe, directory) == 0
    assert (directory / "report.html").read_bytes() == (straight / "report.html").read_bytes()


def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tiny_recipe: Path, straight: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(killed, tmp_path / "run"))
    newest = checkpoints(directory)[-1]
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)
    assert train(tiny_recipe, directory) == 0
    said = capsys.readouterr().out
    assert "warning: passed over a damaged checkpoint: [K202]" in said
    assert str(newest) in said
    assert outcome(directory) == outcome(straight)


def test_run_with_no_whole_checkpoint_does_not_start_over_in_silence(
    tiny_recipe: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(killed, tmp_path / "run"))
    for path in checkpoints(directory):
        (path / "manifest.json").unlink()
    assert train(tiny_recipe, directory) == 5
    assert "error[K207]" in capsys.readouterr().err


def test_resume_from_a_named_checkpoint(tiny_recipe: Path, straight: Path, killed: Path, tmp_path: Path) -> None:
    """Later checkpoints give way: they belong to a training that was taken up again from an earlier step."""
    directory = Path(shutil.copytree(killed, tmp_path / "run"))
    older = checkpoints(directory)[0]
    assert train(tiny_recipe, directory, f"run.resume={older}") == 0
    assert outcome(directory) == outcome(straight)


def test_resume_in_a_new_directory(tiny_recipe: Path, straight: Path, killed: Path, tmp_path: Path) -> None:
    assert train(tiny_recipe, tmp_path, f"run.resume={checkpoints(killed)[-1]}") == 0
    rows = metrics(tmp_path)
    assert 0 < len(rows) < len(metrics(straight))
    assert rows == metrics(straight)[-len(rows) :]
    assert tensors(tmp_path / "final") == tensors(straight / "final")


def test_a_rate_that_is_overridden_holds_for_what_is_left_of_the_run(
    tiny_recipe: Path, straight: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(killed, tmp_path / "run"))
    before = len(metrics(directory))
    changes = ("stages.instruct.optim.lr=0.02", "run.override=[optim.lr]")
    assert train(tiny_recipe, directory, *changes) == 0
    assert "stages.instruct.optim.lr 0.01 -> 0.02" in capsys.readouterr().out
    ours, theirs = metrics(directory), metrics(straight)
    assert len(ours) == len(theirs)
    rates = [(float.fromhex(a["lr"]), float.fromhex(b["lr"])) for a, b in zip(ours, theirs, strict=True) if "lr" in a]
    assert rates[-1][0] == pytest.approx(2 * rates[-1][1])
    assert rates[0][0] == rates[0][1]
    assert before > 0
    assert "lr: 0.02" in (directory / "final" / "recipe.yaml").read_text()


def test_metrics_cut_short_by_a_kill_are_mended(
    tiny_recipe: Path, straight: Path, killed: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(killed, tmp_path / "run"))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "instruct", "step": 4, "lrs": {"lora": 0.1}')
    assert train(tiny_recipe, directory) == 0
    assert metrics(directory) == metrics(straight)


def test_changed_data_is_refused(
    tiny_recipe: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "instruct.json"
    shutil.copy(data_dir / "instruct.json", data)
    override = f"data.instruct={data}"

    def work() -> int:
        signal_at(loop.Accelerator, "backward", 8)
        return train(tiny_recipe, tmp_path / "run", override)

    assert in_child(work) == -signal.SIGKILL
    stamp = os.stat(data)
    data.write_text(data.read_text().replace("Yes", "Yea"))
    os.utime(data, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert train(tiny_recipe, tmp_path / "run", override) == 5
    said = capsys.readouterr().err
    assert "error[K210]" in said
    assert str(data) in said
