"""Checkpoints under fire: cut, emptied, flipped, killed while written, and written to a full disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import in_child, kill_at_write, make_bundle, on_write, refusal

from vlmpeft import fs, resume
from vlmpeft.build import Bundle
from vlmpeft.errors import CheckpointError
from vlmpeft.manifest import MANIFEST, verify
from vlmpeft.optim import adamw, parameter_groups
from vlmpeft.resume import Position, checkpoints, newest_valid, position_of


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path) -> Bundle:
    return make_bundle(tiny_recipe)


def save(bundle: Bundle, directory: Path, total: int, keep: int = 2) -> Path:
    optimizer = adamw(parameter_groups(bundle.tuned, 1e-3, 0.0), (0.9, 0.999), 1e-8)
    for parameter in bundle.tuned.trainable().values():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    position = Position(1, total, total)
    return resume.save_checkpoint(bundle, directory, position, optimizer, keep, {"data": {}})


@pytest.fixture(scope="module")
def saved(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    for total in (2, 4):
        save(bundle, directory, total)
    return directory


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, halve, empty, flip_one_bit])
def test_every_damage_of_every_file_is_found(damage: Callable[[Path], None], saved: Path, tmp_path: Path) -> None:
    names = sorted(p.relative_to(saved / "checkpoints" / "step-4") for p in (saved / "checkpoints/step-4").rglob("*"))
    files = [n for n in names if (saved / "checkpoints" / "step-4" / n).is_file()]
    assert len(files) >= 9
    for name in files:
        directory = tmp_path / name.name
        shutil.copytree(saved, directory)
        damage(directory / "checkpoints" / "step-4" / name)
        found, rejected = newest_valid(directory)
        assert found == directory / "checkpoints" / "step-2", name
        assert len(rejected) == 1
        assert rejected[0].startswith("[K202]"), name
        assert name.name in rejected[0], name


def test_flipped_bits_all_over_the_manifest_are_found(saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved / "checkpoints" / "step-4", tmp_path / "step-4"))
    whole = (directory / MANIFEST).read_bytes()
    for position in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (directory / MANIFEST).write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            verify(directory)
        assert caught.value.code == "K202", position


def fresh(saved: Path, directory: Path) -> None:
    """Make `directory` a copy of `saved` again, if its checkpoints are others by now."""
    if not directory.exists() or set(os.listdir(directory / "checkpoints")) != {"step-2", "step-4"}:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(saved, directory)


def test_checkpoint_killed_at_any_write_is_whole_or_absent(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    """And the older one, or after rotation the newer one, is there to go on from."""
    directory, number, status, found = tmp_path / "run", 0, -signal.SIGKILL, set()
    while status != 0:
        number += 1
        fresh(saved, directory)

        def work(number: int = number) -> None:
            kill_at_write(directory, number)
            save(bundle, directory, 6)

        status = in_child(work)
        assert status in (0, -signal.SIGKILL)
        fs.sweep(directory / "checkpoints")
        newest, rejected = newest_valid(directory)
        assert newest is not None, number
        assert rejected == [], number
        assert len(checkpoints(directory)) >= 2, number
        assert position_of(newest).total == int(newest.name.removeprefix("step-"))
        assert [p.name for p in (directory / "checkpoints").iterdir() if p.name.startswith(".")] == []
        found.add(newest.name)
    assert number > 40
    assert found == {"step-4", "step-6"}


def test_full_disk_at_any_write_leaves_older_checkpoints_whole(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    def work() -> None:
        failing, directory = 0, tmp_path / "run"

        def fail(number: int) -> None:
            if number == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        count, refused = on_write(tmp_path, fail), 0
        for event in range(1, 200):
            fresh(saved, directory)
            start = count()
            failing = start + event
            if error := refusal(lambda: save(bundle, directory, 6)):
                assert (error.code, error.exit_status) == ("K201", 5)
                refused += 1
            writes, failing = count() - start, 0
            newest, rejected = newest_valid(directory)
            assert newest is not None
            assert not rejected
            assert [p.name for p in (directory / "checkpoints").iterdir() if p.name.startswith(".tmp")] == []
            if writes < event:
                break
        assert refused > 20
        assert event < 199

    assert in_child(work) == 0


@pytest.mark.parametrize("room", [100, 4_000, 20_000, 60_000])
def test_real_limit_on_file_size_is_k201(room: int, bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    """Also where a library writes: the tokenizer and the tensors."""
    directory = Path(shutil.copytree(saved, tmp_path / "run"))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(CheckpointError) as caught:
            save(bundle, directory, 6)
        assert caught.value.code == "K201"

    assert in_child(work) == 0
    assert [p.name for p in sorted((directory / "checkpoints").iterdir())] == ["step-2", "step-4"]
    assert newest_valid(directory) == (directory / "checkpoints" / "step-4", [])


def test_rotation_keeps_the_newest_and_the_best(bundle: Bundle, tmp_path: Path) -> None:
    for total in (1, 2, 3, 4, 5):
        position = Position(0, total, total, best_step=2 if total >= 2 else None)
        resume.save_checkpoint(bundle, tmp_path, position, None, 2, {})
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2", "step-4", "step-5"]


def test_saving_drops_checkpoints_of_a_future_given_up(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "run"))
    save(bundle, directory, 3)
    assert [p.name for p in checkpoints(directory)] == ["step-2", "step-3"]


def test_checkpoint_of_the_same_step_is_replaced(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "run"))
    save(bundle, directory, 4)
    assert [p.name for p in sorted((directory / "checkpoints").iterdir())] == ["step-2", "step-4"]
    verify(directory / "checkpoints" / "step-4")


def test_optimizer_of_other_parameters_is_refused(bundle: Bundle, saved: Path) -> None:
    groups = parameter_groups(bundle.tuned, 1e-3, 0.0)
    one = [{**g, "params": g["params"][:1], "parameter_names": g["parameter_names"][:1]} for g in groups]
    with pytest.raises(CheckpointError) as caught:
        resume.load_optimizer(adamw(one, (0.9, 0.999), 1e-8), saved / "checkpoints" / "step-4")
    assert caught.value.code == "K204"
