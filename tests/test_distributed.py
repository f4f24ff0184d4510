"""Two gloo processes train what one trains: losses, weights, samples; they stop, fail and resume together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import in_processes, same_run
from runs import FAST, make_trainer, run_train, signal_at

from vlmpeft import data, loop
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.checkpoint import load
from vlmpeft.errors import DataError

# 12 of 16 samples train in stage 2, in steps of 11 and of 1; some have no image. The eps keeps AdamW's division from
# blowing rounding errors up; dropout draws differ from process to process.
MIXED = (
    "stages.instruct.tuners.lora.dropout=0", "stages.instruct.batch.group=none", "stages.instruct.batch.size=11",
    "stages.pretrain.optim.eps=0.1", "stages.instruct.optim.eps=0.1", "stages.instruct.optim.clip=0.5",
    "stages.pretrain.optim.epochs=1", "stages.instruct.optim.epochs=2", "stages.instruct.optim.l2_sp=0.01",
    "data.held_out=0.25", "run.eval_every=2", "run.timeout_s=50",
)  # fmt: skip
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def record_samples(file: Path) -> None:
    """From now on every sample that is read is written down."""
    original = data.Samples.__getitem__

    def read(self: data.Samples, index: int) -> Any:
        if index != data.FILLER:
            with file.open("a") as out:
                out.write(f"{self.samples[index].uid}\n")
        return original(self, index)

    data.Samples.__getitem__ = read  # type: ignore[method-assign]


def samples(*files: Path) -> list[str]:
    return sorted(uid for file in files for uid in file.read_text().splitlines())


@pytest.fixture(scope="module")
def alone(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Samples, "__getitem__", data.Samples.__getitem__)
        record_samples(directory.parent / "seen")
        assert run_train(tiny_recipe, directory, *MIXED) == 0
    return directory


def together(recipe: Path, directory: Path, *more: str, before: Callable[[int], None] | None = None) -> list[int]:
    """The same run by two processes. Returns: their exit statuses."""

    def work(rank: int) -> int:
        record_samples(directory.parent / f"seen-{rank}")
        if before:
            before(rank)
        return run_train(recipe, directory, *MIXED, *more)

    return in_processes(work, directory.parent)


def test_the_processes_differ_in_what_they_see(tiny_recipe: Path, tmp_path: Path) -> None:
    """What the runs below depend on: steps in which a process has no sample, or none with an image."""
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path, *MIXED)
    steps = list(loop.planned(trainer.stage, trainer.data.train, trainer.run.seed, 0, trainer.total))
    shares = [[loop.micro_batches(step, 2, rank, 2) for rank in (0, 1)] for step in steps]
    texts = {i for i, s in enumerate(trainer.data.train) if IMAGE_TOKEN_ID not in s.input_ids}
    flat = [[{i for forward in share for i in forward} for share in pair] for pair in shares]
    assert any(not one for pair in flat for one in pair)
    assert any(set(forward) <= texts and forward for pair in shares for share in pair for forward in share)
    assert all(len(a) == len(b) for a, b in shares)
    assert max(len(a) for a, _ in shares) > 1


def test_two_processes_train_what_one_trains(tiny_recipe: Path, alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert together(tiny_recipe, directory) == [0, 0]
    same_run(directory, alone)
    assert samples(tmp_path / "seen-0", tmp_path / "seen-1") == samples(alone.parent / "seen")
    assert load(directory / "final").stage.template == "chatml"


def test_a_run_of_two_goes_on_with_one_and_the_other_way_round(tiny_recipe: Path, alone: Path, tmp_path: Path) -> None:
    def stop(rank: int) -> None:
        if rank == 0:  # after 3 forwards of stage 1, and 4 of an epoch of stage 2
            signal_at(loop.Accelerator, "backward", 3 + 4 + 2, signal.SIGTERM)

    first = tmp_path / "a" / "run"
    assert together(tiny_recipe, first, before=stop) == [143, 143]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Samples, "__getitem__", data.Samples.__getitem__)
        record_samples(tmp_path / "a" / "seen")
        assert run_train(tiny_recipe, first, *MIXED) == 0
    same_run(first, alone)
    seen = [tmp_path / "a" / name for name in ("seen-0", "seen-1", "seen")]
    assert samples(*seen) == samples(alone.parent / "seen")


def test_a_run_of_one_goes_on_with_two(tiny_recipe: Path, alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"

    def begin(_: int) -> int:
        record_samples(tmp_path / "seen")
        signal_at(loop.Accelerator, "backward", 5 + 7 + 3, signal.SIGTERM)
        return run_train(tiny_recipe, directory, *MIXED)

    assert in_processes(begin, tmp_path / "log", count=1) == [143]
    assert together(tiny_recipe, directory) == [0, 0]
    same_run(directory, alone)
    seen = [tmp_path / name for name in ("seen", "seen-0", "seen-1")]
    assert samples(*seen) == samples(alone.parent / "seen")
    assert "trained by 1 processes so far, now by 2" in (tmp_path / "out-0.txt").read_text()


def test_another_global_batch_is_refused(tiny_recipe: Path, alone: Path, tmp_path: Path) -> None:
    """The batch of a step is the recipe's whatever the number of processes, so only the recipe can change it."""
    directory = Path(shutil.copytree(alone, tmp_path / "run"))
    statuses = together(tiny_recipe, directory, "stages.instruct.batch.size=10")
    out = "".join((tmp_path / f"out-{rank}.txt").read_text() for rank in (0, 1))
    assert statuses == [5, 6]
    assert "error[K210] process 0: " in out
    assert "stages.instruct.batch.size 11 -> 10" in out


def test_sharded_processes_train_what_one_trains(tiny_recipe: Path, alone: Path, tmp_path: Path) -> None:
    """FSDP2 through both stages and their evaluations; and one process goes on from what it saved in the middle."""
    directory = tmp_path / "run"

    def work(_: int) -> int:
        return run_train(tiny_recipe, directory, *MIXED, "run.keep=9")

    assert in_processes(work, tmp_path, environment=FSDP2) == [0, 0]
    same_run(directory, alone, atol=1e-4)
    shutil.rmtree(directory / "final")
    for number in (6, 7):
        shutil.rmtree(directory / "checkpoints" / f"step-{number}", ignore_errors=True)
    assert run_train(tiny_recipe, directory, *MIXED) == 0
    same_run(directory, alone, atol=1e-4)


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_the_first_error_of_a_process_ends_all(tiny_recipe: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    def work(rank: int) -> int:
        if rank == 1:
            original, calls = loop.StageTrainer._step, [0]

            def step(self: loop.StageTrainer, *arguments: Any) -> Any:
                calls[0] += 1
                if calls[0] == 3:
                    raise DataError("D104", "a.png: truncated.", "replace it.")
                return original(self, *arguments)

            loop.StageTrainer._step = step  # type: ignore[method-assign]
        return run_train(tiny_recipe, tmp_path / "run", *MIXED, "run.save_every=1")

    assert in_processes(work, tmp_path, environment=environment) == [6, 3]
    first, second = ((tmp_path / f"out-{rank}.txt").read_text() for rank in (0, 1))
    assert "error[D104] process 1: a.png: truncated. Fix: replace it." in second
    assert "error[E430] process 0 ended because another failed first: process 1: [D104] a.png: truncated." in first
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1", "step-2"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_torchrun_starts_the_command(tiny_recipe: Path, tmp_path: Path) -> None:
    """As the pages say; the launcher keeps the store in which the first failure is registered."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["stages.pretrain=null", "stages.instruct.optim.steps=1", "stages.instruct.batch.size=4", "run.timeout_s=50"]
    command = [*launch, "-m", "vlmpeft.train", f"recipe={tiny_recipe}", f"run.dir={tmp_path / 'run'}", *FAST[:1]]
    with subprocess.Popen([*command, *more], start_new_session=True, stderr=subprocess.PIPE, text=True) as started:
        try:
            error = started.communicate(timeout=180)[1]  # three interpreters import everything; waits end after 50 s
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, error[-2000:]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-1" / "state.json").read_text())
    assert (state["total"], state["processes"]) == (1, 2)


def test_a_process_that_is_killed_ends_the_others(tiny_recipe: Path, tmp_path: Path) -> None:
    def kill(rank: int) -> None:
        if rank == 1:
            signal_at(loop.Accelerator, "backward", 5)

    assert together(tiny_recipe, tmp_path / "run", before=kill) == [6, -signal.SIGKILL]
    assert "E430" in (tmp_path / "out-0.txt").read_text()


def test_processes_wait_no_longer_than_the_timeout(tiny_recipe: Path, tmp_path: Path) -> None:
    def hang(rank: int) -> None:
        if rank == 1:
            loop.StageTrainer._step = lambda *_: time.sleep(50)  # type: ignore[assignment, method-assign]

    def work(rank: int) -> int:
        hang(rank)
        signal.alarm(20)  # what a launcher does to the others once one has failed
        return run_train(tiny_recipe, tmp_path / "run", *MIXED, "run.timeout_s=4")

    assert in_processes(work, tmp_path) == [6, -signal.SIGALRM]
    assert "error[E430] process 0" in (tmp_path / "out-0.txt").read_text()
