"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import resource
import signal
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from runs import WRITES, holding, in_child, kill_at_write, on_write, refusal

from vlmpeft import fs
from vlmpeft.errors import CheckpointError


def test_text_json_and_lines_are_written(tmp_path: Path) -> None:
    fs.write_text(tmp_path / "deep" / "text", "zwei\nZeilen äöü")
    fs.write_json(tmp_path / "values.json", {"b": 1, "a": "ä"})
    for line in ("one", "two"):
        fs.append_line(tmp_path / "lines", line)
    assert (tmp_path / "deep" / "text").read_text(encoding="utf-8") == "zwei\nZeilen äöü"
    assert (tmp_path / "values.json").read_text(encoding="utf-8") == '{\n "a": "ä",\n "b": 1\n}\n'
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_file_modes_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        fs.write_text(tmp_path / "text", "x")
        fs.write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(2)})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {"text": mode, "t.safetensors": mode}


def fail_in(opened: AbstractContextManager[Path], name: str = "") -> None:
    with opened as path:
        (path / name).write_text("half")
        raise ZeroDivisionError


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    fs.write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError):
        fail_in(fs.writing(tmp_path / "file"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with fs.new_directory(target) as directory:
        (directory / "file").write_text("old")
    with pytest.raises(ZeroDivisionError):
        fail_in(fs.new_directory(target), "file")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_directory_killed_at_any_write_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with fs.new_directory(tmp_path / "made") as directory:
            fs.write_text(directory / "inner" / "file", text)

    write("old")
    seen = set()
    for number in range(1, 100):

        def work(number: int = number) -> None:
            kill_at_write(tmp_path, number)
            write("new")

        status = in_child(work)
        fs.sweep(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["made"], number
        seen.add((tmp_path / "made" / "inner" / "file").read_text())
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert number > 8
    assert seen == {"old", "new"}


def test_every_file_of_a_directory_is_flushed_before_its_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    original = fs.fsync

    def record(path: Path) -> None:
        original(path)
        flushed.append("parent" if path == tmp_path else path.name)

    monkeypatch.setattr(fs, "fsync", record)
    with fs.new_directory(tmp_path / "made") as directory:
        (directory / "tokenizer").mkdir()
        (directory / "tokenizer" / "written_by_a_library").write_text("x")
    assert {"tokenizer", "written_by_a_library"} <= set(flushed[: flushed.index("parent")])
    assert flushed[-1] == "parent"


def test_sweep_leaves_names_of_others(tmp_path: Path) -> None:
    others = [".tmp-mine", ".trash", ".Trash-1000", ".old-thing", "old-x-00112233", ".cache"]
    for name in others:
        (tmp_path / name).mkdir()
    for name in (".tmp-step-4-00112233", ".trash-step-2-aabbccdd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".tmp-metrics.jsonl-01234567").write_text("x")
    assert len(fs.sweep(tmp_path)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)
    assert fs.sweep(tmp_path / "nowhere") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_at_any_write_is_one_line_and_leaves_a_whole_file(code: int, tmp_path: Path) -> None:
    def work() -> None:
        failing = 0

        def fail(number: int) -> None:
            if number == failing:
                raise OSError(code, os.strerror(code))

        whole = []
        for value in (0.0, 1.0):
            fs.write_tensors(tmp_path / "t", {"a": torch.full((3,), value)})
            whole.append((tmp_path / "t").read_bytes())
        count, refused = on_write(tmp_path, fail), 0
        for event in range(1, 2 * len(WRITES)):
            failing = count() + event
            tensors = {"a": torch.full((3,), float(event % 2))}
            error = refusal(lambda tensors=tensors: fs.write_tensors(tmp_path / "t", tensors))
            if error:
                refused += 1
                assert error.code == "K201"
                assert "bytes free" in error.message
            assert (tmp_path / "t").read_bytes() in whole
            assert [p.name for p in tmp_path.iterdir()] == ["t"]
        assert refused >= 2

    assert in_child(work) == 0


@pytest.mark.parametrize("room", [0, 100, 4096])
def test_real_file_size_limit_inside_a_library_is_k201(room: int, tmp_path: Path) -> None:
    """safetensors writes in Rust and raises an error of its own."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        for write in (
            lambda: fs.write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(5000)}),
            lambda: fs.write_text(tmp_path / "text", "x" * 5000),
            lambda: fs.append_line(tmp_path / "line", "x" * 5000),
        ):
            with pytest.raises(CheckpointError) as caught:
                write()
            assert caught.value.code == "K201"
        assert not (tmp_path / "t.safetensors").exists()

    assert in_child(work) == 0
    assert [p for p in tmp_path.iterdir() if p.name != "line"] == []


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), fs.writing(tmp_path / "x"):
        raise ValueError("mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        fs.append_line(tmp_path / "file" / "below", "x")


def test_read_only_place_is_k206(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, fs.writing(tmp_path / "x"):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))
    assert caught.value.code == "K206"


def test_lock_names_its_owner_and_dies_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    with holding(lock) as holder:
        with pytest.raises(CheckpointError) as caught:
            fs.acquire(lock)
        assert caught.value.code == "K211"
        assert f"process {holder.pid} on " in caught.value.message
        holder.kill()
    assert lock.is_file()
    handle = fs.acquire(lock)
    assert str(os.getpid()) in lock.read_text()
    fs.release(lock, handle)
    assert not lock.exists()


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    fs.require_room(tmp_path / "not" / "there", 1)
    with pytest.raises(CheckpointError, match=r"K201.*GiB free, this writes up to 931322574.62 GiB"):
        fs.require_room(tmp_path / "not" / "there", 10**18)
    assert not (tmp_path / "not").exists()
