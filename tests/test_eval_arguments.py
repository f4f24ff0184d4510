"""Arguments of a benchmark's command line and the rows it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmpeft.errors import ConfigError, EvalError
from vlmpeft.eval import runner
from vlmpeft.eval.pope import read_questions
from vlmpeft.eval.rows import read_rows

DEFAULTS = {"suffix": "\nBriefly.", "batch_size": 16, "quick": False, "compare": None}


def parsed(*argv: str) -> dict[str, Any]:
    return runner.parse_arguments(argv, DEFAULTS, ("model", "out"), "What it does.")


def test_arguments_take_the_type_of_their_default() -> None:
    values = parsed("model=m=1", "out=o", "batch_size=4", "quick=true", r"suffix=\nWhy?")
    assert values == {**DEFAULTS, "model": "m=1", "out": "o", "batch_size": 4, "quick": True, "suffix": "\nWhy?"}
    assert parsed("out=o", r"model=C:\new") == {**DEFAULTS, "model": r"C:\new", "out": "o"}  # a path is left alone
    assert parsed("out=o", "model=m", r"compare=C:\new")["compare"] == r"C:\new"  # nor is an optional one
    assert parsed("out=o", "model=m", "suffix=")["suffix"] == ""


@pytest.mark.parametrize(
    ("argument", "code", "says"),
    [
        ("batchsize=4", "C101", "no key 'batchsize'; did you mean 'batch_size'?"),
        ("batch_size=0", "C102", "expected an integer from 1"),
        ("batch_size=-1", "C102", "expected an integer from 1"),
        ("batch_size=1.5", "C102", "expected an integer from 1"),
        ("batch_size=\u0663", "C102", "expected an integer from 1"),
        ("batch_size=" + "9" * 5000, "C102", "expected an integer from 1"),
        ("quick=maybe", "C102", "expected true or false"),
        ("quick", "C102", "expected key=value, got 'quick'"),
        ("--quick=true", "C102", "expected key=value, got '--quick=true'"),
        ("out=p", "C102", "out is given twice"),
    ],
)
def test_wrong_argument_is_refused_with_the_remedy(argument: str, code: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("model=m", "out=o", argument)
    assert caught.value.code == code
    assert says in caught.value.line()


@pytest.mark.parametrize("argv", [(), ("out=o",), ("model=", "out=o")])
def test_missing_argument_is_named(argv: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="model is not given"):
        parsed(*argv)


def test_help_prints_the_keys_with_their_defaults_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("nonsense", "--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("What it does.\n")
    for line in ("  model=...  required", r"  suffix=\nBriefly.", "  batch_size=16", "  quick=false"):
        assert line in printed.splitlines()


def test_rows_are_read_with_bom_crlf_blank_lines_and_line_separators_in_text(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "a\u2028b"}\r\n\r\n{"text": "\u00e9"}'.encode())
    assert read_rows(path) == [{"text": "a\u2028b"}, {"text": "\u00e9"}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": ', "Expecting value at column 9"),
        (b"not json", "Expecting value at column 1"),
        (b"[1]", "expected an object, got list"),
        (b"null", "expected an object, got NoneType"),
        (b'{"txt": "a", "question_id": 1}', "no key 'text'; did you mean 'txt'?"),
        (b'{"text": "a"}', "no key 'question_id'"),
        (b'{"text": 3, "question_id": 1}', "'text' must be text, got 3"),
        (b'{"text": null, "question_id": 1}', "'text' must be text, got None"),
        (b'{"text": "a", "question_id": 1.5}', "'question_id' must be text or an integer, got 1.5"),
        (b'{"text": "a", "question_id": true}', "'question_id' must be text or an integer, got True"),
        (b'{"text": "\xff", "question_id": 1}', "no text in UTF-8"),
        (b'{"text": "a", "question_id": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_bad_row_is_refused_with_file_and_line(line: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"text": "a", "question_id": 1}\n\n' + line + b"\n")
    with pytest.raises(EvalError) as caught:
        read_rows(path, ("question_id", "text"))
    assert caught.value.code == "V602"
    assert "q.jsonl line 3: " in caught.value.line()
    assert says in caught.value.line()


def test_file_without_rows_and_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(EvalError, match=r"V602.*has no rows"):
        read_rows(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="no file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="is a folder"):
        read_rows(tmp_path)


def test_a_key_of_another_benchmark_or_of_another_way_to_call_one_says_which_is_meant() -> None:
    with pytest.raises(ConfigError, match="the questions of this benchmark are named by data=PATH"):
        runner.parse_arguments(["questions=q.jsonl"], {}, ("data", "answers"), "")
    with pytest.raises(ConfigError, match="named by questions=PATH"):
        runner.parse_arguments(["data=q.jsonl"], {}, ("questions", "answers"), "")
    with pytest.raises(ConfigError, match="model is given beside answers"):
        runner.parse_arguments(["model=m"], {}, ("questions", "answers"), "")


def test_a_comma_too_many_between_files_is_named() -> None:
    with pytest.raises(ConfigError, match="a name is missing beside a comma"):
        read_questions("a.jsonl,")
