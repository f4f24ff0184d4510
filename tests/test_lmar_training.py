"""`diagnose` while training: rows, what they hold, that they disturb nothing, resume, the report's charts."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from runs import in_child, make_trainer, metrics, outcome, run_train

from vlmpeft.diagnose import evenly
from vlmpeft.loop import StageTrainer
from vlmpeft.report import write_report
from vlmpeft.report_attention import attention
from vlmpeft.report_data import read_run

LAYERS = 2  # of the tiny language model
OFTEN = ("diagnose.every=2", "diagnose.samples=3")


def readings(directory: Path, stage: str) -> dict[int, dict[str, list[float]]]:
    """Rows of a stage that `diagnose` wrote, by step."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = [r for r in rows if r["stage"] == stage and "visual_mass" in r]
    assert len({r["step"] for r in found}) == len(found)
    return {r["step"]: r for r in found}


@pytest.fixture(scope="module")
def diagnosed(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with readings and a held-out share."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert run_train(tiny_recipe, directory, "data.held_out=0.25", *OFTEN) == 0
    return directory


def test_it_reads_before_the_first_step_every_so_many_and_at_the_end(diagnosed: Path) -> None:
    for stage in ("pretrain", "instruct"):
        found = readings(diagnosed, stage)
        last = json.loads((diagnosed / "summary.json").read_text())["stages"][stage == "instruct"]["steps"]
        assert list(found) == [*range(0, last, 2), last]
        for row in found.values():
            assert len(row["visual_mass"]) == LAYERS
            assert all(0 < share < 1 for share in row["visual_mass"])
            assert ("lmar" in row) == (stage == "instruct")  # a caption's prompt has no text to compare with
    first, *_, last_row = readings(diagnosed, "instruct").values()
    assert first["lmar"] != last_row["lmar"]


def test_training_is_bit_for_bit_what_it_is_without(tiny_recipe: Path, diagnosed: Path, tmp_path: Path) -> None:
    assert run_train(tiny_recipe, tmp_path / "plain", "data.held_out=0.25") == 0
    with_rows, plain = outcome(diagnosed), outcome(tmp_path / "plain")
    with_rows["metrics"] = [row for row in with_rows["metrics"] if "visual_mass" not in row]
    assert with_rows == plain


@pytest.mark.parametrize("count", [2, 5])  # after the checkpoint at the reading's own step; before a stage's first step
def test_a_run_killed_right_after_a_reading_resumes_without_making_it_twice(
    tiny_recipe: Path, diagnosed: Path, tmp_path: Path, count: int
) -> None:
    def killed() -> int:
        original, rows = StageTrainer._log, 0

        def log(self: StageTrainer, **row: object) -> None:
            nonlocal rows
            original(self, **row)
            rows += "visual_mass" in row
            if rows == count:
                os.kill(os.getpid(), signal.SIGKILL)

        StageTrainer._log = log  # type: ignore[method-assign]
        return run_train(tiny_recipe, tmp_path / "run", "data.held_out=0.25", *OFTEN)

    assert in_child(killed) == -signal.SIGKILL
    assert run_train(tiny_recipe, tmp_path / "run", "data.held_out=0.25", *OFTEN) == 0
    assert metrics(tmp_path / "run") == metrics(diagnosed)


def test_without_held_out_samples_it_reads_training_samples_with_images(tiny_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path, *OFTEN)
    assert len(trainer.diagnosis.chosen) == 3
    assert all(trainer.data.train[i].images for i in trainer.diagnosis.chosen)
    state = torch.get_rng_state()
    first, again = trainer.diagnosis.read(trainer.bundle.model), trainer.diagnosis.read(trainer.bundle.model)
    assert first == again  # dropout is off
    assert torch.get_rng_state().equal(state)


def test_as_many_samples_as_there_are_is_the_most(tiny_recipe: Path, tmp_path: Path) -> None:
    train = make_trainer(tiny_recipe, "instruct", tmp_path).data.train
    assert len(train) == 16
    assert evenly(train, 99) == [i for i in range(16) if train.pictures[i]]
    assert evenly(train, 2) == [0, 6]


def test_the_report_draws_readings_and_says_nothing_without_them(diagnosed: Path, tmp_path: Path) -> None:
    html = write_report(diagnosed).read_text()
    assert html.count("<title>LMAR</title>") == 1
    assert html.count("<title>Visual attention</title>") == 2
    assert "image = text" in html
    assert "step 0" in html
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1, "loss": 2.0}\n')
    assert attention(read_run(tmp_path), "a") == ""
    rows = [{"stage": "a", "step": s, "visual_mass": [0.1, None], "lmar": [None, None]} for s in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = attention(read_run(tmp_path), "a")
    assert "LMAR" not in found  # no layer has a ratio
    assert [f"step {s}" in found for s in range(9)] == [s in (0, 2, 4, 6, 8) for s in range(9)]
