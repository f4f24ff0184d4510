"""How much memory a stretch of work takes above what was there before it.

On CUDA this is what PyTorch's allocator handed out. On a CPU under Linux it is the process's resident set, whose high
mark the kernel resets; freed pages are given back first, or the stretch would work in memory of the one before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_MARK = "5"  # Linux, Documentation/filesystems/proc.rst


class PeakMemory:
    """`with PeakMemory(device) as memory: ...`, then `memory.bytes`; None where the system does not tell."""

    bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
            return self
        with contextlib.suppress(OSError, AttributeError):  # other systems have no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        try:
            CLEAR.write_text(RESET_HIGH_MARK)
            self._before = _resident("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
        self.bytes = None if peak is None else max(0, peak - self._before)


def _resident(entry: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    return None
