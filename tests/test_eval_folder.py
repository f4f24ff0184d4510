"""The output folder of an evaluation: one of other settings is refused, a finished one is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_runs import contents, pope_run, stop_after, undisturbed
from native import native_directory
from runs import in_child

import vlmpeft
from vlmpeft import checkpoint
from vlmpeft.build import Bundle
from vlmpeft.errors import run_command
from vlmpeft.eval import pope
from vlmpeft.eval.answer_log import locked
from vlmpeft.eval.rows import read_rows, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def straight(model: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(model, data_dir, tmp_path_factory.mktemp("straight") / "out")


def test_a_finished_evaluation_is_left_alone(
    straight: Path, model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(straight)
    monkeypatch.setattr(vlmpeft, "load", None)
    assert pope_run(model, data_dir, straight) == 0
    assert contents(straight) == before
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("already complete: ")
    assert said[1].split() == ["setting", *pope.COLUMNS]


@pytest.mark.parametrize("half_done", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("max_new_tokens=4", "max_new_tokens 3 -> 4"),
        ("suffix=!", "suffix '\\nAnswer the question using a single word or phrase.' -> '!'"),
        ("ablate=blank", "ablate 'none' -> 'blank'"),
        ("batch_size=5", "batch_size 3 -> 5"),
        ("questions", "questions_sha256 '"),
        ("model", "model_fingerprint '"),
        ("template", "template 'chatml' -> 'vicuna_v1'"),
    ],
)
def test_other_settings_are_refused_by_name_before_the_model_is_loaded(
    change: str, named: str, half_done: bool, model: Path, data_dir: Path, straight: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, more = straight, [change]
    if half_done:
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            stop_after(2, patch)
            assert pope_run(model, data_dir, out) == 130
    if change == "questions":
        rows = read_rows(data_dir / "pope.jsonl")
        write_rows(tmp_path / "other.jsonl", [{**rows[0], "text": "Is there a hat?"}, *rows[1:]])
        more = [f"questions={tmp_path / 'other.jsonl'}"]
    if change in ("model", "template"):
        manifest = json.loads((model / "manifest.json").read_text())
        manifest |= {"template": "vicuna_v1"} if change == "template" else {"seal": "0" * 64}
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
        more = [f"model={tmp_path / 'other'}"]
    before = contents(out)
    monkeypatch.setattr(vlmpeft, "load", None)
    capsys.readouterr()
    keys = {word.partition("=")[0] for word in more}
    given = {"model": model, "questions": data_dir / "pope.jsonl", "images": data_dir / "images", "out": out}
    arguments = [f"{key}={value}" for key, value in given.items() if key not in keys]
    small = [word for word in ("batch_size=3", "max_new_tokens=3") if word.partition("=")[0] not in keys]
    assert run_command(pope.main, [*arguments, *small, *more]) == 5
    error = capsys.readouterr().err
    assert error.startswith("vlmpeft: error[K210] ")
    assert named in error
    assert error.count("\n") == 1
    assert "overwrite=true" in error
    assert contents(out) == before


def test_overwriting_moves_the_earlier_results_aside(
    straight: Path, model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert pope_run(model, data_dir, out, "ablate=blank") == 0
    (out / "notes.txt").write_text("mine")
    blank = contents(out)
    assert pope_run(model, data_dir, out, "overwrite=true") == 0
    assert contents(out) == {**contents(straight), "notes.txt": b"mine"}
    (moved,) = tmp_path.glob("out.old-*")
    assert contents(moved) == {name: blank[name] for name in ("answers.jsonl", "metrics.json", "wrong.html")}


def test_a_moved_model_and_other_ways_to_write_a_path_are_the_same_evaluation(
    straight: Path, model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_dir)
    monkeypatch.setattr(vlmpeft, "load", None)
    arguments = [f"model={model}/", "questions=pope.jsonl", "images=images", f"out={straight}"]
    assert run_command(pope.main, [*arguments, "batch_size=3", "max_new_tokens=3"]) == 0


def test_a_comparison_can_be_added_to_a_finished_evaluation(
    straight: Path, model: Path, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert pope_run(model, data_dir, out) == 0
    assert pope_run(model, data_dir, out, f"compare={straight}") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.pop("compare") == {
        **{"with": str(straight), "accuracy": metrics["accuracy"], "difference": 0.0},
        **{"better": 0, "worse": 0, "equal": 12, "p_value": 1.0},
    }
    assert metrics == json.loads((straight / "metrics.json").read_text())


def test_two_at_once_in_one_folder_are_refused(
    model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def work() -> int:  # a lock is a process's: another one tries
        return pope_run(model, data_dir, out)

    with locked(out):
        assert in_child(work) == 5


def test_out_of_memory_says_what_to_lower(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def answer(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nmore")

    monkeypatch.setattr(Bundle, "answer", answer)
    assert pope_run(model, data_dir, tmp_path / "out") == 6
    assert "error[E401] out of memory in a batch of 3 questions: tried to allocate 3 GiB" in capsys.readouterr().err


def test_a_damaged_model_directory_is_refused_by_loading_it(model: Path, data_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    assert pope_run(broken, data_dir, tmp_path / "out") == 5
    assert checkpoint.load(model).stage.template == "chatml"


def test_a_run_that_ended_before_its_first_answer_binds_nobody(
    model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    assert pope_run(tmp_path / "nothing", data_dir, tmp_path / "out") == 5
    assert "error[K202]" in capsys.readouterr().err
    assert pope_run(model, data_dir, tmp_path / "out") == 0
