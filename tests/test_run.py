"""A whole run through the command line: what it leaves, and what it refuses to start on."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import holding, in_child, metrics, run_train, signal_at, tensors
from safetensors.torch import load_file

from vlmpeft import evaluation, run
from vlmpeft.manifest import verify
from vlmpeft.resume import checkpoints

ASKED = ("eval.max_new_tokens=2", "eval.batch_size=12")
ROW = ["stage", "step", "loss", "lr", "lrs", "grad_norm", "tokens_per_s", "supervised_tokens"]


def questions(data_dir: Path) -> tuple[str, ...]:
    return (f"eval.questions={data_dir / 'pope.jsonl'}", *ASKED)


@pytest.fixture(scope="module")
def finished(tiny_recipe: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every step kept, questions and a tracker."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    more = ("run.save_every=1", "run.keep=50", "run.trackers=[tensorboard]")
    assert run_train(tiny_recipe, directory, *more, *questions(data_dir)) == 0
    return directory


def test_run_leaves_the_documented_files(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    documented = {"recipe.yaml", "metrics.jsonl", "checkpoints", "final", "report.html"}
    assert names == documented | {"summary.json", "evaluation.json", "samples.jsonl", "answers", "trackers"}
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [ROW] * 12
    assert [(r["stage"], r["step"]) for r in rows] == [("pretrain", n) for n in range(1, 7)] + [
        ("instruct", n) for n in range(1, 7)
    ]
    assert all(row["loss"] > 0 and row["tokens_per_s"] > 0 and row["supervised_tokens"] >= 1 for row in rows)
    assert [set(row["lrs"]) for row in rows] == [{"projector"}] * 6 + [{"lora", "projector"}] * 6
    assert rows[1]["lr"] == 0.01
    assert rows[7]["lrs"]["lora"] == pytest.approx(10 * rows[7]["lrs"]["projector"])


def test_checkpoints_are_numbered_over_all_stages_and_each_is_whole(finished: Path) -> None:
    assert [p.name for p in checkpoints(finished)] == [f"step-{n}" for n in range(1, 13)]
    manifests = [verify(p) for p in [*checkpoints(finished), finished / "final"]]
    assert [m["stage"] for m in manifests] == ["pretrain"] * 6 + ["instruct"] * 7
    facts = manifests[0]["facts"]["data"]
    assert (facts["pretrain"]["used"], facts["instruct"]["used"]) == (12, 16)
    assert all(m["facts"]["data"] == facts for m in manifests)


def test_stage_2_starts_from_the_projector_of_stage_1(finished: Path) -> None:
    """The first step's learning rate is 0, so the checkpoint after it still holds the start."""
    ends, start, later = (
        load_file(finished / "checkpoints" / f"step-{n}" / "projector.safetensors") for n in (6, 7, 8)
    )
    assert all(torch.equal(ends[k], start[k]) for k in ends)
    assert not any(torch.equal(start[k], later[k]) for k in ends)
    adapter = load_file(finished / "checkpoints" / "step-7" / "adapters" / "lora" / "adapter_model.safetensors")
    assert all((v == 0).all() == ("lora_B" in k) for k, v in adapter.items())


def test_init_starts_one_stage_from_the_projector_of_another_run(
    finished: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished / "checkpoints" / "step-6"
    more = ("stages.pretrain=null", "run.save_every=1", "run.keep=9", "stages.instruct.optim.steps=2")
    assert run_train(tiny_recipe, tmp_path / "run", f"init={before}", *more) == 0
    name = "projector.safetensors"
    assert tensors(tmp_path / "run" / "checkpoints" / "step-1")[name] == tensors(before)[name]
    assert run_train(tiny_recipe, tmp_path / "other", f"init={finished / 'final'}", *more) == 4
    assert "error[M533]" in capsys.readouterr().err


def test_summary_and_evaluation(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert [(s["name"], s["steps"], s["samples"]) for s in summary["stages"]] == [
        ("pretrain", 6, 12),
        ("instruct", 6, 16),
    ]
    assert [s["final_loss"].hex() for s in summary["stages"]] == [metrics(finished)[i]["loss"] for i in (5, 11)]
    assert all(s["seconds"] > 0 for s in summary["stages"])
    assert summary["data"] == {"records": 28, "used": 28, "skipped": 0, "animated": 0}
    assert set(evaluation.read(finished)) == {"before", "after", "blank"}
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert all(s["before"] is not None and s["after"] is not None for s in samples)


def test_samples_join_answers_by_question(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    """The answers from before may be those to other questions, in another order."""
    for moment in ("before", "after"):
        rows = (finished / "answers" / f"pope-{moment}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "answers").mkdir(exist_ok=True)
        kept = rows[:0:-1] if moment == "before" else rows
        (tmp_path / "answers" / f"pope-{moment}.jsonl").write_text("".join(kept))
    config = evaluation.EvalConfig(questions=str(data_dir / "pope.jsonl"), images=str(data_dir / "images"))
    evaluation.write_samples(evaluation.benchmarks(config, None), tmp_path)
    mixed, straight = (
        [json.loads(line) for line in (d / "samples.jsonl").read_text().splitlines()] for d in (tmp_path, finished)
    )
    assert mixed[0] == {**straight[0], "before": None}
    assert mixed[1:] == straight[1:]


def test_tracker_writes_events_and_unusable_ones_are_refused(
    finished: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = list((finished / "trackers").rglob("events.out.tfevents.*"))
    assert sum(p.stat().st_size for p in events) > 1000
    assert run_train(tiny_recipe, tmp_path / "a", "run.trackers=[tensorbord]") == 2
    assert "no tracker 'tensorbord'; did you mean 'tensorboard'?" in capsys.readouterr().err
    assert run_train(tiny_recipe, tmp_path / "a", "run.trackers=[wandb]") == 6
    assert (
        "error[E413] run.trackers: 'wandb' needs a package that is not installed. Fix: pip install wandb"
        in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


CALLS: dict[str, tuple[Callable[[], None], int]] = {
    "in the evaluation before": (lambda: signal_at(evaluation.Benchmark, "ask", 1, signal.SIGTERM), 0),
    "in the evaluation after": (lambda: signal_at(evaluation.Benchmark, "ask", 2, signal.SIGTERM), 12),
}


@pytest.mark.parametrize("where", list(CALLS))
def test_sigterm_in_an_evaluation_exits_143(
    where: str, finished: Path, tiny_recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    send, steps = CALLS[where]

    def work() -> int:
        send()
        return run_train(tiny_recipe, tmp_path, *questions(data_dir))

    assert in_child(work) == 143
    assert len(metrics(tmp_path)) == steps
    assert not (tmp_path / "final").exists()
    if steps:  # nothing is trained again
        assert run_train(tiny_recipe, tmp_path, *questions(data_dir)) == 0
        assert tensors(tmp_path / "final") == tensors(finished / "final")
        assert (tmp_path / "evaluation.json").read_bytes() == (finished / "evaluation.json").read_bytes()


def test_progress_shows_no_frame_twice(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(tiny_recipe, tmp_path, "stages.instruct=null") == 0
    captured = capsys.readouterr()
    frames = [f for f in re.split(r"[\r\n]", captured.err) if f.startswith("pretrain:")]
    counts = [re.search(r"(\d+)/6", f) for f in frames]
    numbers = [int(c[1]) for c in counts if c]
    assert numbers == sorted(set(numbers)) or numbers == [*sorted(set(numbers)), 6]  # closing draws the last once more
    assert all("loss=" in f for f in frames[1:])
    said = captured.out.splitlines()
    assert len(said) == len(set(said))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_place_that_cannot_be_written_is_found_before_the_model_loads(
    place: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "assemble", None)
    (tmp_path / "file").write_text("mine")
    assert run_train(tiny_recipe, tmp_path / place) == 2
    assert "error[C111] run.dir=" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_directory_of_a_living_run_is_refused_and_of_a_dead_one_taken_over(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("stages.instruct=null", "stages.pretrain.optim.steps=1")
    with holding(tmp_path / "run.lock") as holder:
        assert run_train(tiny_recipe, tmp_path, *short) == 5
        assert f"error[K211] process {holder.pid} on " in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["run.lock"]
        holder.kill()
    assert (tmp_path / "run.lock").is_file()
    assert run_train(tiny_recipe, tmp_path, *short) == 0
    assert not (tmp_path / "run.lock").exists()
