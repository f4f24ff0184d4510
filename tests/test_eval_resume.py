"""An evaluation that was killed goes on where it was, and ends in the same bytes; one of other settings is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from native import native_directory
from runs import in_child, kill_at_write, on_write

import vlmpeft
from vlmpeft import checkpoint
from vlmpeft.build import Bundle
from vlmpeft.decode import Answer, Request
from vlmpeft.errors import EvalError, NumericError, run_command
from vlmpeft.eval import pope
from vlmpeft.eval.answer_log import AnswerLog, locked, open_folder, part_file
from vlmpeft.eval.asking import Remembering, batches_of
from vlmpeft.eval.rows import read_rows, write_rows
from vlmpeft.eval.team import Team

BATCHES = 4  # of 12 questions in threes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_directory(tmp_path_factory.mktemp("model"))


def pope_run(model: Path, data_dir: Path, out: Path, *more: str) -> int:
    """The command on the tiny model. Returns: its exit status."""
    arguments = [f"model={model}", f"questions={data_dir / 'pope.jsonl'}", f"images={data_dir / 'images'}"]
    given = {word.partition("=")[0] for word in more}
    small = [word for word in ("batch_size=3", "max_new_tokens=3") if word.partition("=")[0] not in given]
    return run_command(pope.main, [*arguments, f"out={out}", "device=cpu", *small, *more])


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def straight(model: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that nothing disturbs; beside them the number of its changes to the disk."""
    out = tmp_path_factory.mktemp("straight") / "out"

    def work() -> int:
        changes = on_write(out, lambda number: None)
        status = pope_run(model, data_dir, out)
        (out.parent / "changes").write_text(str(changes()))
        return status

    assert in_child(work) == 0
    return out


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


def stop_after(count: int, patch: pytest.MonkeyPatch) -> list[int]:
    """From now on asking ends in KeyboardInterrupt after `count` batches. Returns: a list of the batches' sizes."""
    original, sizes = Bundle.answer, list[int]()

    def answer(self: Bundle, requests: Sequence[Request], **options: Any) -> list[Answer]:
        if len(sizes) == count:
            raise KeyboardInterrupt
        sizes.append(len(requests))
        return original(self, requests, **options)

    patch.setattr(Bundle, "answer", answer)
    return sizes


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


def test_a_batch_holds_questions_about_the_same_images_longest_first() -> None:
    one, two = (Path("1.png"),), (Path("2.png"),)
    requests = [Request(one, "aa"), Request(two, "a"), Request(one, "a"), Request(two, "aaa"), Request((), "aa")]
    assert batches_of(requests, 2) == [[3, 1], [0, 2], [4]]
    assert batches_of(requests, 4) == [[3, 1, 0, 2], [4]]
    assert batches_of([], 4) == []


class Counting:
    """Says how often it was asked, and remembers what."""

    def __init__(self, margin: float = 0.5) -> None:
        self.margin, self.asked = margin, list[str]()

    def answer(self, requests: Sequence[Request], **_: object) -> list[Answer]:
        self.asked += [request.prompt for request in requests]
        return [Answer(request.prompt.upper(), self.margin) for request in requests]

    def blank_image(self, image: Any) -> Any:
        raise AssertionError


def remembering(folder: Path, bundle: Any = None) -> Remembering:
    folder.mkdir(exist_ok=True)
    open_folder(folder, {}, False)
    return Remembering(bundle or Counting(), AnswerLog(folder, Team()))


def test_a_second_round_of_questions_is_kept_apart_from_the_first(tmp_path: Path) -> None:
    """A benchmark of a user's own may ask twice, the second time about what was said the first."""
    rounds = [[Request((), "a"), Request((), "b")], [Request((), "c"), Request((), "d")]]
    first = remembering(tmp_path)
    expected = [first.answer(asked, batch_size=1) for asked in rounds]
    assert [[a.text for a in answers] for answers in expected] == [["A", "B"], ["C", "D"]]
    silent = Counting()
    again = remembering(tmp_path, silent)
    assert [again.answer(asked, batch_size=1) for asked in rounds] == expected
    assert silent.asked == []


def test_progress_counts_what_was_answered_before(tmp_path: Path) -> None:
    requests = [Request((), prompt) for prompt in ("ccc", "bb", "a")]
    remembering(tmp_path).answer(requests, batch_size=2)
    seen: list[tuple[int, str]] = []
    remembering(tmp_path).answer(
        requests, batch_size=2, on_batch=lambda pairs: seen.extend((index, answer.text) for index, answer in pairs)
    )
    assert seen == [(0, "CCC"), (1, "BB"), (2, "A")]


@pytest.mark.parametrize("margin", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_an_error_and_not_kept(margin: float, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="N301"):
        remembering(tmp_path, Counting(margin)).answer([Request((), "a")])
    mended = Counting()
    remembering(tmp_path, mended).answer([Request((), "a")])
    assert mended.asked == ["a"]


def test_out_of_memory_says_what_to_lower(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def answer(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nmore")

    monkeypatch.setattr(Bundle, "answer", answer)
    assert pope_run(model, data_dir, tmp_path / "out") == 6
    assert "error[E401] out of memory in a batch of 3 questions: tried to allocate 3 GiB" in capsys.readouterr().err


def test_answers_of_a_process_that_writes_elsewhere_are_missed(tmp_path: Path) -> None:
    remembering(tmp_path)
    alone = Remembering(Counting(), AnswerLog(tmp_path, Team(rank=0, size=2)))
    with pytest.raises(EvalError, match=r"V604.*1 of 2 batches"):
        alone.answer([Request((), "a"), Request((), "b")], batch_size=1)


def test_a_damaged_model_directory_is_refused_by_loading_it(model: Path, data_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    assert pope_run(broken, data_dir, tmp_path / "out") == 5
    assert checkpoint.load(model).stage.template == "chatml"
