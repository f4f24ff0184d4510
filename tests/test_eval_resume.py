"""An evaluation that was killed goes on where it was, and ends in the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from eval_runs import BATCHES, contents, pope_run, stop_after, undisturbed
from native import native_directory
from runs import in_child, kill_at_write

from vlmpeft.eval.answer_log import part_file
from vlmpeft.eval.rows import read_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def straight(model: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(model, data_dir, tmp_path_factory.mktemp("straight") / "out")


def test_a_run_leaves_its_results_alone(straight: Path) -> None:
    assert list(contents(straight)) == ["answers.jsonl", "metrics.json", "wrong.html"]
    assert len({row["text"] for row in read_rows(straight / "answers.jsonl")}) > 1


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
def test_killed_at_any_change_to_the_disk_it_ends_in_the_same_bytes(
    share: float, straight: Path, model: Path, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    last = int((straight.parent / "changes").read_text())

    def work() -> int:
        kill_at_write(out, 1 + round(share * (last - 1)))
        return pope_run(model, data_dir, out)

    assert in_child(work) == -9
    assert pope_run(model, data_dir, out) == 0
    assert contents(out) == contents(straight)


@pytest.mark.parametrize("size", [1, 4])
def test_the_batch_size_changes_no_answer(
    size: int, straight: Path, model: Path, data_dir: Path, tmp_path: Path
) -> None:
    assert pope_run(model, data_dir, tmp_path / "out", f"batch_size={size}") == 0
    ours, theirs = (read_rows(out / "answers.jsonl") for out in (tmp_path / "out", straight))
    assert [(a["question_id"], a["text"]) for a in ours] == [(a["question_id"], a["text"]) for a in theirs]
    assert [a["margin"] for a in ours] == pytest.approx([a["margin"] for a in theirs], abs=1e-4)


@pytest.mark.parametrize("cut", [1, 9, 60])
def test_a_line_that_a_kill_cut_short_is_asked_again_and_no_other(
    cut: int, straight: Path, model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert pope_run(model, data_dir, out) == 130
    part = part_file(out, 0)
    part.write_bytes(part.read_bytes()[:-cut])
    sizes = stop_after(BATCHES, monkeypatch)
    assert pope_run(model, data_dir, out) == 0
    assert sizes == [3, 3, 3]
    assert contents(out) == contents(straight)


def test_power_that_went_leaves_zeros_that_are_dropped(
    straight: Path, model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert pope_run(model, data_dir, out) == 130
    with part_file(out, 0).open("ab") as part:
        part.write(b"\0" * 100 + b"\n" + b'{"call": 0, "batch": 1, "answers": 3}\n[]\n')
    assert pope_run(model, data_dir, out) == 0
    assert contents(out) == contents(straight)
