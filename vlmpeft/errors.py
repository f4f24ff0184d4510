"""The errors a user can cause: one line that says what, where and how to mend it, a code, and an exit status."""

from __future__ import annotations

import contextlib
import difflib
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PREEMPTED = 143  # exit status after SIGTERM with a checkpoint saved (128 + 15)
INTERRUPTED = 130  # after Ctrl-C (128 + 2)
CLOSED_PIPE = 141  # whoever read our output stopped reading (128 + 13)
INTERNAL = 70  # exit status of a fault of ours (EX_SOFTWARE of sysexits.h)


def printable(text: str) -> str:
    """Text as one line: control characters, line breaks and invisible marks are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class VlmpeftError(Exception):
    """Base of every error with a code. `code` is a letter and three digits, for example "D104".

    Args:
        code: stable identifier; its letter decides the exit status.
        message: what went wrong and where, naming file, record, key or tensor.
        fix: what the user can do, as an imperative sentence.
    """

    exit_status = INTERNAL

    def __init__(self, code: str, message: str, fix: str = "") -> None:
        self.code, self.message, self.fix = code, message, fix
        super().__init__(self.line())

    def line(self) -> str:
        """The error as one printable line; control characters in names are escaped."""
        return printable(f"[{self.code}] {self.message}" + (f" Fix: {self.fix}" if self.fix else ""))


class ConfigError(VlmpeftError):
    """A recipe or a command line that cannot be used (C).

    Args: key: dotted path of the recipe's key that is wrong, where it is one.
    """

    exit_status = 2

    def __init__(self, code: str, message: str, fix: str = "", key: str = "") -> None:
        super().__init__(code, message, fix)
        self.key = key


class DataError(VlmpeftError):
    """A record or an image that cannot be used (D)."""

    exit_status = 3


class ModelError(VlmpeftError):
    """A model, tokenizer, tuner or adapter that does not fit (M)."""

    exit_status = 4


class CheckpointError(VlmpeftError):
    """A directory that cannot be written, read or resumed (K)."""

    exit_status = 5


class EnvironmentFault(VlmpeftError):
    """Something missing on the machine: memory, a package, the network (E)."""

    exit_status = 6


class NumericError(VlmpeftError):
    """A loss or gradient that is not finite (N)."""

    exit_status = 7


class EvalError(VlmpeftError):
    """Questions and answers that cannot be scored (V)."""

    exit_status = 8


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'? (known: ...)`, the tail of every unknown-name message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6) if len(name) > 1 or name in names else []
    close = close or [n for n in names if _one_letter_off(name, n)]
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(names) or 'none'})"


def _one_letter_off(name: str, other: str) -> bool:
    """Whether two names differ in one letter: for names too short for a likeness."""
    return len(name) == len(other) and sum(a != b for a, b in zip(name, other, strict=True)) == 1


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command line and turn errors into one line on stderr and an exit status.

    Args:
        command: takes the arguments, returns an exit status or None for 0.
        argv: arguments without the program name; `sys.argv[1:]` if None. `--debug` prints tracebacks.

    Returns:
        the exit status: 0, the error's own, 70 for a fault of ours, 130 after Ctrl-C, 141 if stdout was closed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = command([a for a in arguments if a != "--debug"]) or 0
        sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return CLOSED_PIPE
        if "--debug" in arguments:
            traceback.print_exc()
        line, status = _report(error)
        print(f"vlmpeft: {line}", file=sys.stderr)
        return status


def _reader_gone() -> bool:
    """Whether nobody reads stdout any more; what is left in its buffer then goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        stdout = sys.stdout.fileno()
        poll = select.poll()
        poll.register(stdout, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # or the interpreter's last flush fails too
            return True
    return False


def _report(error: BaseException) -> tuple[str, int]:
    """What the user reads of an error, and the exit status."""
    if isinstance(error, VlmpeftError):
        return f"error{error.line()}", error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    log = Path(os.environ.get("VLMPEFT_ERROR_LOG", "vlmpeft-error.log")).absolute()
    try:
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
        where = f"traceback in {log}"
    except OSError:
        where = "run again with --debug for the traceback"
    return printable(f"internal error: {type(error).__name__}: {error} ({where})"), INTERNAL
