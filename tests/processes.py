"""Several processes that make a gloo group: forked from the test, which has imported everything, and ended in time;
and what must be equal between a run of theirs and one of a single process."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

LIMIT_S = 60.0  # all processes together; then they are killed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def in_processes(
    work: Callable[[int], int | None], log: Path, count: int = 2, environment: Mapping[str, str] | None = None
) -> list[int]:
    """Run `work(rank)` in `count` forked processes of one group.

    Args: log: folder for what each prints, `out-RANK.txt`.
    Returns: exit statuses; -9 for one that had to be killed at the time limit.
    """
    log.mkdir(parents=True, exist_ok=True)
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    group |= {"VLMPEFT_ERROR_LOG": str(log / "error.log"), **(environment or {})}
    sys.stdout.flush()
    sys.stderr.flush()
    pids = [_fork(work, rank, log, {k: str(v) for k, v in group.items()}) for rank in range(count)]
    return _wait(pids)


def _fork(work: Callable[[int], int | None], rank: int, log: Path, group: Mapping[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        out = os.open(log / f"out-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))  # not what the test captures
        os.environ |= {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        AcceleratorState._reset_state(reset_partial_state=True)  # what the test's own process has set up
        GradientState._reset_state()
        status = work(rank) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pids: list[int]) -> list[int]:
    ends: dict[int, int] = {}
    until = time.monotonic() + LIMIT_S
    while len(ends) < len(pids):
        for pid in (p for p in pids if p not in ends):
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if time.monotonic() > until else os.WNOHANG)
            if done:
                ends[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [ends[pid] for pid in pids]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted((directory / "final").rglob("*.safetensors"))
    return {f"{f.name}/{k}": t for f in files for k, t in load_file(f).items()}


def curve(directory: Path, *keys: str) -> list[list[float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in keys if key in row] for row in rows]


def same_run(found: Path, expected: Path, atol: float = 1e-5) -> None:
    """Losses, norms and penalties of every step, and the weights at the end."""
    keys = ("step", "loss", "eval_loss", "grad_norm", "drift", "supervised_tokens")
    for ours, theirs in zip(curve(found, *keys), curve(expected, *keys), strict=True):
        assert ours == pytest.approx(theirs, abs=atol, rel=1e-5)
    torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=atol)
