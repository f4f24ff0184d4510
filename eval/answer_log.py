"""Answers on the disk as they come, batch by batch, so that an evaluation that was killed goes on where it was.

`answers.part-RANK.jsonl` holds one line a finished batch. What a kill cut short is dropped and asked again; since a
batch is always asked as a whole, it then gets the same answers to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft import fs
from vlmpeft.errors import CheckpointError, NumericError
from vlmpeft.eval.team import Team

if TYPE_CHECKING:
    from vlmpeft.decode import Answer

Pairs = Sequence[tuple[int, "Answer"]]  # index of a request, its answer
LOCK = "answers.lock"
METRICS = "metrics.json"
RESULTS = ("answers.jsonl", "wrong.html", "results.json", METRICS)
PARTS = "answers.part-*.jsonl"
SHOWN = 60  # characters of a value in a message


def part_file(folder: Path, rank: int) -> Path:
    """The file that a process adds its batches to."""
    return folder / f"answers.part-{rank}.jsonl"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an output folder for this process. Raises: CheckpointError K211 while another evaluates there."""
    handle = fs.acquire(folder / LOCK)
    try:
        yield
    finally:
        fs.release(folder / LOCK, handle)


def open_folder(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Make a held folder ready for a fresh evaluation, or for one to go on with. Returns: the metrics if it is over.

    Args: settings: what answers and figures depend on. overwrite: move earlier results to FOLDER.old-TIME first.
    Raises: CheckpointError K210 naming the settings in which earlier results differ.
    """
    fs.sweep(folder)
    if overwrite:
        _move_away(folder)
    parts = sorted(folder.glob(PARTS))
    if parts:
        begun, batches = part_file(folder, 0), batches_of(parts)
        if batches:  # what ended before its first answer, as with a model that was not there, binds nobody
            _compare(folder, _header(begun), settings)
        _write_part(begun, settings, batches)
        for part in parts:
            if part != begun:
                part.unlink()
        return None
    if (folder / METRICS).is_file():
        metrics = _object((folder / METRICS).read_text(encoding="utf-8"))
        _compare(folder, metrics, settings)
        return metrics
    _write_part(part_file(folder, 0), settings, {})
    return None


def close_folder(folder: Path) -> None:
    """Remove the parts once the results are written; the first, which says what it is about, goes last."""
    for part in sorted(folder.glob(PARTS), reverse=True):
        part.unlink()


def _move_away(folder: Path) -> None:
    found = [folder / name for name in RESULTS if (folder / name).is_file()] + sorted(folder.glob(PARTS), reverse=True)
    if found:
        moved = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        moved.mkdir(exist_ok=True)
        for path in found:
            fs.replace(path, moved / path.name)


def _compare(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """`old` may say more than `new`, not less and not otherwise."""
    changed = [
        f"{key} {_short(old.get(key))} -> {_short(value)}" for key, value in new.items() if old.get(key) != value
    ]
    if changed:
        message = f"{folder} holds an evaluation with other settings: {'; '.join(changed)}."
        raise CheckpointError("K210", message, "set overwrite=true, or another out.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _header(part: Path) -> dict[str, Any]:
    first = part.read_bytes().partition(b"\n")[0] if part.is_file() else b""
    settings = _object(first.decode("utf-8", "replace")).get("settings")
    return settings if isinstance(settings, dict) else {}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_part(part: Path, settings: Mapping[str, Any], batches: Mapping[tuple[int, int], Pairs]) -> None:
    lines = [json.dumps({"settings": dict(settings)}), *(_line(*key, pairs) for key, pairs in batches.items())]
    fs.write_text(part, "".join(line + "\n" for line in lines))


def _line(call: int, batch: int, pairs: Pairs) -> str:
    answers = [[index, answer.text, answer.margin, answer.logliks] for index, answer in pairs]
    return json.dumps({"call": call, "batch": batch, "answers": answers})


def batches_of(parts: Sequence[Path]) -> dict[tuple[int, int], Pairs]:
    """(call, batch) to its answers, of every line that is whole."""
    lines = [line for part in parts for line in part.read_bytes().split(b"\n")[:-1]]
    return dict(found for line in lines if (found := _batch(line.decode("utf-8", "replace"))) is not None)


def _batch(line: str) -> tuple[tuple[int, int], Pairs] | None:
    from vlmpeft.decode import Answer

    row = _object(line)
    try:
        pairs = [
            (int(index), Answer(text, margin, None if logliks is None else tuple(logliks)))
            for index, text, margin, logliks in row["answers"]
        ]
        return (int(row["call"]), int(row["batch"])), pairs
    except (KeyError, TypeError, ValueError):
        return None


class AnswerLog:
    """The parts of one evaluation, to which every process adds its own batches.

    Args:
        folder: one that all processes see, made ready by `open_folder`.
    """

    def __init__(self, folder: Path, team: Team) -> None:
        self.folder, self.team = folder, team

    def read(self) -> dict[tuple[int, int], Pairs]:
        """(call, batch) to the answers that are there, of all processes."""
        return batches_of(sorted(self.folder.glob(PARTS)))

    def add(self, call: int, batch: int, pairs: Pairs) -> None:
        """Keep a finished batch. Raises: NumericError N301 if a number is not finite: no result to go on with."""
        numbers = [x for _, answer in pairs for x in (answer.margin, *(answer.logliks or ())) if x is not None]
        wrong = [number for number in numbers if not math.isfinite(number)]
        if wrong:
            message = f"the model's logits are not finite: {wrong[0]} in a batch of {len(pairs)} answers."
            raise NumericError("N301", message, "try dtype float32 or an earlier checkpoint.")
        fs.append_line(part_file(self.folder, self.team.rank), _line(call, batch, pairs))
