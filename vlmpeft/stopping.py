"""SIGTERM as a request to stop: what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


class Preempted(BaseException):
    """SIGTERM was received and what was done is saved. Not an Exception, so that no library in between swallows it."""


class StopSignal:
    """Turns SIGTERM into a flag that is read between steps; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        self._at_once, self._pid = False, os.getpid()

    def __enter__(self) -> StopSignal:
        self.previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, self.previous)
        if self._at_once and os.getpid() == self._pid:  # a worker process leaves it to its parent
            raise Preempted

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def check(self) -> None:
        """Raises: Preempted if SIGTERM was received."""
        if self.received:
            raise Preempted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, SIGTERM raises Preempted where it hits: for stretches with nothing to save."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
        self.check()
