"""What an examination finds: one line a check, `ok`, `note` or `FAIL`; the first failure decides the exit status."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from vlmpeft.errors import VlmpeftError, printable

Status = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        where: the stage, or "run".
        check: its name.
        text: what was found, and where.
        code, fix: of a failure: the error's, and how to mend it.
        exit_status: of a failure, else 0.
    """

    status: Status
    where: str
    check: str
    text: str
    code: str = ""
    fix: str = ""
    exit_status: int = 0

    def line(self) -> str:
        """For people, in one printable line."""
        code, fix = (f"[{self.code}] " if self.code else ""), (f" Fix: {self.fix}" if self.fix else "")
        return printable(f"{self.status:<5}{self.where} {self.check}: {code}{self.text}{fix}")


class Findings:
    """Collects findings and tells each as it is made.

    Args: say: told every line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.all: list[Finding] = []

    def add(self, status: Status, where: str, check: str, text: str, error: VlmpeftError | None = None) -> None:
        """Note what was found. Args: error: of a failure."""
        code, fix, number = ("", "", 0) if error is None else (error.code, error.fix, error.exit_status)
        self.all.append(Finding(status, where, check, text, code, fix, number))
        self.say(self.all[-1].line())

    @contextlib.contextmanager
    def judging(self, where: str, check: str) -> Iterator[None]:
        """An error of ours inside the block is a failed check; what follows the block goes on."""
        try:
            yield
        except VlmpeftError as error:
            self.add("FAIL", where, check, error.message, error)

    @property
    def exit_status(self) -> int:
        """Of the first failure; 0 without one."""
        return next((found.exit_status for found in self.all if found.status == "FAIL"), 0)

    def summary(self) -> str:
        """The last line of a report."""
        count = {status: sum(f.status == status for f in self.all) for status in ("FAIL", "note", "ok")}
        verdict = "not ready to train" if count["FAIL"] else "ready to train"
        return f"{verdict}: {count['ok']} ok, {count['note']} notes, {count['FAIL']} failed"

    def plain(self) -> dict[str, object]:
        """The same as values for JSON."""
        checks = [dataclasses.asdict(found) for found in self.all]
        return {"ready": not self.exit_status, "exit_status": self.exit_status, "checks": checks}
