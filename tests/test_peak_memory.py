"""The memory of a stretch of work, told apart from what was there before it."""

from __future__ import annotations

import sys

import pytest
import torch

from vlmpeft.peak_memory import PeakMemory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the high mark of resident memory")
def test_a_passing_allocation_is_seen_and_an_earlier_one_is_not() -> None:
    device = torch.device("cpu")
    kept = torch.ones(64 * MIB // 4)  # before: no part of the stretch
    with PeakMemory(device) as large:
        torch.ones(96 * MIB // 4).sum()
    with PeakMemory(device) as small:
        torch.ones(16).sum()
    assert large.bytes is not None
    assert small.bytes is not None
    assert 90 * MIB < large.bytes < 150 * MIB
    assert small.bytes < 16 * MIB
    assert len(kept) == 16 * MIB
