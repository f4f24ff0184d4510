"""Two gloo processes evaluate as one does: every question once, the same bytes, one voice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from native import native_directory
from processes import in_processes

from vlmpeft.build import Bundle
from vlmpeft.errors import DataError, run_command
from vlmpeft.eval import pope
from vlmpeft.eval.answer_log import part_file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_directory(tmp_path_factory.mktemp("model"))


def pope_run(model: Path, data_dir: Path, out: Path, *more: str) -> int:
    paths = [f"model={model}", f"questions={data_dir / 'pope.jsonl'}", f"images={data_dir / 'images'}", f"out={out}"]
    return run_command(pope.main, [*paths, "device=cpu", "batch_size=2", "max_new_tokens=3", *more])


def record_asked(file: Path) -> None:
    """From now on every prompt and image that a model is asked about is written down."""
    original = Bundle.answer

    def answer(self: Bundle, requests: Any, **options: Any) -> Any:
        with file.open("a") as out:
            out.writelines(f"{request.images} {request.prompt!r}\n" for request in requests)
        return original(self, requests, **options)

    Bundle.answer = answer  # type: ignore[method-assign]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def alone(model: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bundle, "answer", Bundle.answer)
        record_asked(out.parent / "asked")
        assert pope_run(model, data_dir, out) == 0
    return out


def together(
    model: Path, data_dir: Path, out: Path, *more: str, before: Callable[[int], None] | None = None
) -> list[int]:
    """The same evaluation by two processes. Returns: their exit statuses."""

    def work(rank: int) -> int:
        record_asked(out.parent / f"asked-{rank}")
        if before:
            before(rank)
        return pope_run(model, data_dir, out, *more)

    return in_processes(work, out.parent)


def asked(*files: Path) -> list[str]:
    return sorted(line for file in files if file.is_file() for line in file.read_text().splitlines())


def test_two_processes_ask_every_question_once_and_leave_the_bytes_of_one(
    model: Path, data_dir: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert together(model, data_dir, out) == [0, 0]
    assert contents(out) == contents(alone)
    files = [tmp_path / f"asked-{rank}" for rank in (0, 1)]
    assert asked(*files) == asked(alone.parent / "asked")
    assert [len(asked(file)) for file in files] == [6, 6]


def test_the_first_process_alone_speaks(model: Path, data_dir: Path, tmp_path: Path) -> None:
    assert together(model, data_dir, tmp_path / "out") == [0, 0]
    first, second = ((tmp_path / f"out-{rank}.txt").read_text() for rank in (0, 1))
    assert "\nall      12  " in first
    assert "12/12" in first
    assert "question" not in second
    assert "setting" not in second


def test_a_finished_evaluation_is_finished_for_all(model: Path, data_dir: Path, alone: Path, tmp_path: Path) -> None:
    before = contents(alone)
    statuses = in_processes(lambda rank: pope_run(model, data_dir, alone), tmp_path)
    assert statuses == [0, 0]
    assert contents(alone) == before
    assert "already complete" in (tmp_path / "out-0.txt").read_text()
    assert "already complete" not in (tmp_path / "out-1.txt").read_text()


def kill_at(count: int) -> None:
    """From now on the `count`-th batch ends this process before it is asked."""
    original, calls = Bundle.answer, 0

    def answer(self: Bundle, requests: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, requests, **options)

    Bundle.answer = answer  # type: ignore[method-assign]


def test_what_two_began_and_lost_one_goes_on_with(model: Path, data_dir: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    statuses = together(model, data_dir, out, before=lambda rank: kill_at(2) if rank == 1 else None)
    assert statuses == [6, -9]
    done = len(asked(tmp_path / "asked-0", tmp_path / "asked-1"))
    assert 2 <= done < 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bundle, "answer", Bundle.answer)
        record_asked(tmp_path / "asked")
        assert pope_run(model, data_dir, out) == 0
    assert contents(out) == contents(alone)
    assert asked(*(tmp_path / name for name in ("asked-0", "asked-1", "asked"))) == asked(alone.parent / "asked")


def test_what_one_began_two_go_on_with(model: Path, data_dir: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def begin(_: int) -> int:
        record_asked(tmp_path / "asked")
        kill_at(4)
        return pope_run(model, data_dir, out)

    assert in_processes(begin, tmp_path / "log", count=1) == [-9]
    assert part_file(out, 0).is_file()
    assert together(model, data_dir, out) == [0, 0]
    assert contents(out) == contents(alone)
    assert asked(*(tmp_path / name for name in ("asked-0", "asked-1", "asked"))) == asked(alone.parent / "asked")


def test_an_error_in_one_ends_both_and_names_it(model: Path, data_dir: Path, tmp_path: Path) -> None:
    def fail(rank: int) -> None:
        def answer(self: Bundle, requests: Any, **options: Any) -> Any:
            raise DataError("D104", "the picture is broken.", "mend it.")

        if rank == 1:
            Bundle.answer = answer  # type: ignore[method-assign]

    assert together(model, data_dir, tmp_path / "out", before=fail) == [6, 3]
    assert "E430" in (text := (tmp_path / "out-0.txt").read_text())
    assert "process 1: [D104] the picture is broken." in text
    assert "the answers so far are kept." in text
