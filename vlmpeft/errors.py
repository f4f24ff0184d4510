"""The errors a user can cause: one line that says what, where and how to mend it, a code, and an exit status."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PREEMPTED = 143  # exit status after SIGTERM with a checkpoint saved (128 + 15)
INTERNAL = 70  # exit status of a fault of ours (EX_SOFTWARE of sysexits.h)


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
        text = f"[{self.code}] {self.message}" + (f" Fix: {self.fix}" if self.fix else "")
        return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class ConfigError(VlmpeftError):
    """A recipe or a command line that cannot be used (C)."""

    exit_status = 2


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
    """` did you mean 'x'? (known: ...)`, the tail of every unknown-name message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{hint} (known: {', '.join(names) or 'none'})"


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command line and turn errors into one line on stderr and an exit status.

    Args:
        command: takes the arguments, returns an exit status or None for 0.
        argv: arguments without the program name; `sys.argv[1:]` if None. `--debug` prints tracebacks.

    Returns:
        the exit status: 0, the error's own, 70 for a fault of ours, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return command([a for a in arguments if a != "--debug"]) or 0
    except VlmpeftError as error:
        print(f"vlmpeft: error{error.line()}", file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt:
        print("vlmpeft: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:  # a fault of ours: still one line, the traceback goes to a file
        log = Path(os.environ.get("VLMPEFT_ERROR_LOG", "vlmpeft-error.log")).absolute()
        log.write_text(traceback.format_exc())
        print(f"vlmpeft: internal error: {type(error).__name__}: {error} (traceback in {log})", file=sys.stderr)
        status = INTERNAL
    if debug:
        traceback.print_exc()
    return status
