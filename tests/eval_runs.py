"""What the tests of an evaluation's output folder share: the POPE command on a tiny model, whole or stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import in_child, on_write

from vlmpeft.build import Bundle
from vlmpeft.decode import Answer, Request
from vlmpeft.errors import run_command
from vlmpeft.eval import pope

BATCHES = 4  # of 12 questions in threes


def pope_run(model: Path, data_dir: Path, out: Path, *more: str) -> int:
    """The command on the tiny model. Returns: its exit status."""
    arguments = [f"model={model}", f"questions={data_dir / 'pope.jsonl'}", f"images={data_dir / 'images'}"]
    given = {word.partition("=")[0] for word in more}
    small = [word for word in ("batch_size=3", "max_new_tokens=3") if word.partition("=")[0] not in given]
    return run_command(pope.main, [*arguments, f"out={out}", "device=cpu", *small, *more])


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def undisturbed(model: Path, data_dir: Path, out: Path) -> Path:
    """The results of a run that nothing disturbs; beside them the number of its changes to the disk."""

    def work() -> int:
        changes = on_write(out, lambda number: None)
        status = pope_run(model, data_dir, out)
        (out.parent / "changes").write_text(str(changes()))
        return status

    assert in_child(work) == 0
    return out


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
