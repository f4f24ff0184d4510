"""What a user sees of an error: one printable line and an exit status."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vlmpeft import errors
from vlmpeft.errors import ConfigError, VlmpeftError, nearest, printable, run_command

STATUS = {
    "ConfigError": 2, "DataError": 3, "ModelError": 4, "CheckpointError": 5, "EnvironmentFault": 6, "NumericError": 7,
    "EvalError": 8,
}  # fmt: skip


def raising(error: BaseException) -> errors.Callable[[Sequence[str]], int | None]:
    def command(argv: Sequence[str]) -> int | None:
        raise error

    return command


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMPEFT_ERROR_LOG", str(tmp_path / "error.log"))
    return tmp_path / "error.log"


@pytest.mark.parametrize("name", STATUS)
def test_every_kind_of_error_is_one_line_with_its_exit_status(
    name: str, log: Path, capsys: pytest.CaptureFixture
) -> None:
    kind = getattr(errors, name)
    assert run_command(raising(kind("X101", "something is wrong.", "mend it.")), []) == STATUS[name]
    assert capsys.readouterr() == ("", "vlmpeft: error[X101] something is wrong. Fix: mend it.\n")
    assert not log.exists()


def test_every_error_class_has_a_status_of_its_own() -> None:
    assert {kind.__name__: kind.exit_status for kind in VlmpeftError.__subclasses__()} == STATUS


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (143, 143)])
def test_the_commands_own_status_is_passed_on(returned: int | None, status: int) -> None:
    assert run_command(lambda argv: returned, []) == status


def test_the_command_gets_its_arguments_without_debug() -> None:
    seen: list[Sequence[str]] = []
    run_command(lambda argv: seen.append(argv), ["a=1", "--debug", "--show"])
    assert seen == [["a=1", "--show"]]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("right\u202eleft", r"right\u202eleft"),
        ("half \udc80", r"half \udc80"),
        ("nul \x00", r"nul \x00"),
        ("Übung 猫", "Übung 猫"),
    ],
)
def test_control_characters_in_names_are_escaped(text: str, line: str) -> None:
    assert printable(text) == line
    assert ConfigError("C101", text).line() == f"[C101] {line}"
    assert str(ConfigError("C101", text)) == f"[C101] {line}"


def test_a_fault_of_ours_is_one_line_and_the_traceback_lies_in_a_file(log: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_command(raising(ZeroDivisionError("a\nb")), []) == 70
    shown = capsys.readouterr().err
    assert shown == f"vlmpeft: internal error: ZeroDivisionError: a\\nb (traceback in {log})\n"
    assert "Traceback" in log.read_text()
    assert "in command" in log.read_text()


def test_a_fault_is_still_one_line_where_no_log_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("VLMPEFT_ERROR_LOG", "/dev/null/error.log")
    assert run_command(raising(KeyError("x")), []) == 70
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [ConfigError("C101", "wrong."), ValueError("wrong")])
def test_debug_prints_the_traceback_too(error: Exception, capsys: pytest.CaptureFixture) -> None:
    run_command(raising(error), ["--debug"])
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert f"raise error\n{type(error).__module__.replace('builtins', '')}" in shown
    assert shown.splitlines()[-1].startswith("vlmpeft: ")


def test_without_debug_there_is_no_traceback(capsys: pytest.CaptureFixture) -> None:
    run_command(raising(ValueError("wrong")), [])
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_exits_with_130(capsys: pytest.CaptureFixture) -> None:
    assert run_command(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "vlmpeft: interrupted\n"


@pytest.mark.parametrize("size", [10, 10**6])  # the first stays in the buffer until the end
def test_a_reader_that_goes_away_ends_the_command_quietly(size: int) -> None:
    code = f"import sys; from vlmpeft.errors import run_command; sys.exit(run_command(lambda a: print('x' * {size})))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, shown = process.communicate(timeout=60)
    assert (process.returncode, shown) == (141, b"")


def test_a_broken_pipe_elsewhere_is_a_fault(log: Path) -> None:
    assert run_command(raising(BrokenPipeError("a worker died")), []) == 70
    assert log.is_file()


def test_the_module_needs_no_torch() -> None:
    code = "import sys, vlmpeft.errors, vlmpeft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "known", "tail"),
    [
        ("dropot", ["dropout", "r"], "; did you mean 'dropout'? (known: dropout, r)"),
        ("lx", ["betas", "lr"], "; did you mean 'lr'? (known: betas, lr)"),
        ("zzz", ["dropout", "r"], " (known: dropout, r)"),
        ("zzz", [], " (known: none)"),
    ],
)
def test_nearest_suggests_what_was_meant_and_lists_the_rest(name: str, known: list[str], tail: str) -> None:
    assert nearest(name, known) == tail


def test_codes_have_a_letter_that_decides_the_status() -> None:
    """Every code in the package: its letter belongs to the class it is raised as."""
    letters = dict(zip("CDMKENV", STATUS, strict=True))
    root = Path(errors.__file__).parent
    found = [
        (kind, code)
        for file in root.rglob("*.py")
        for kind, code in re.findall(r"(\w+)\(\s*\"([A-Z]\d{3})\"", file.read_text(encoding="utf-8"))
        if kind in STATUS
    ]
    assert len(found) > 50
    assert [(kind, code) for kind, code in found if letters.get(code[0]) != kind] == []
