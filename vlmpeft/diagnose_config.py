"""The recipe section `diagnose`."""

from __future__ import annotations

from dataclasses import dataclass

from vlmpeft.tuners.base import check


@dataclass(frozen=True)
class DiagnoseConfig:
    """LMAR while a model trains; see `diagnose`.

    every: optimizer steps between two readings, 0 for none. samples: with images that are read, always the same, of
    those held out or, where none are, of the training data.
    """

    every: int = 0
    samples: int = 16

    def __post_init__(self) -> None:
        check(self.every >= 0, "diagnose.every", self.every, "0 or more")
        check(self.samples >= 1, "diagnose.samples", self.samples, "at least 1")
