"""JSON records one at a time, from a list or from JSON lines of any size, with the place of what is wrong."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from vlmpeft.errors import DataError

CHUNK = 1 << 20  # bytes read at once
TOKEN = 16  # a word or escape that the end of a chunk cuts begins at most so many characters before it
SPACE, NUMBER = re.compile(r"[ \t\n\r]*"), re.compile(r"[0-9.eE+-]*")
WHOLE = " (a JSON-lines file needs one whole record a line)"


def json_records(path: Path) -> Iterator[Any]:
    """Records of a JSON list or JSON-lines file; a byte-order mark is accepted.

    Raises: DataError D101 with file, line and column.
    """
    with path.open("rb") as file:
        head = file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        yield from _lines(path, file) if head.startswith(b"{") else _Listed(path, file).records()


def _lines(path: Path, file: BinaryIO) -> Iterator[Any]:
    """Only line feeds end a record: a string may hold other line separators, as U+2028."""
    start = 0
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, start + error.start) from error
        start += len(raw)
        if line and not line.isspace():
            try:
                yield _DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise _wrong(path, number, error.colno, error.msg + WHOLE) from error
            except _Constant as error:
                raise _wrong(path, number, error.place(line, 0) + 1, str(error)) from error
            except (RecursionError, ValueError) as error:
                raise _wrong(path, number, 1, _reason(error)) from error


class _Listed:
    """A JSON list, of which one record and what was read with it are in memory.

    Attributes: text: begins at `line` and `column` of the file. at: where the unread part of it begins.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at, self.line, self.column, self.bytes, self.ended = "", 0, 1, 1, 0, False

    def records(self) -> Iterator[Any]:
        """Each item of the list. Raises: as `json_records`."""
        if self._next() != "[":
            raise DataError("D101", f"{self.path} is neither a JSON list nor JSON lines.", "write a list of records.")
        self.at += 1
        more = self._next() != "]"
        while more:
            yield self._value()
            more = self._next() == ","
            if not more and self._next() != "]":
                self._fail("Expecting ',' delimiter", self.at)
            self.at += more
            self._next()
        self.at += 1
        if self._next():
            self._fail("Extra data", self.at)

    def _next(self) -> str:
        """The next character that is not white space, unread; "" at the end."""
        while True:
            self.at = _end_of(SPACE, self.text, self.at)
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def _value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or len(self.text) - error.pos < TOKEN
                if not (cut and self._read()):
                    self._fail(error.msg, error.pos)
            except _Constant as error:
                self._fail(str(error), error.place(self.text, self.at))
            except (RecursionError, ValueError) as error:
                self._fail(_reason(error), self.at)
            else:
                if _end_of(NUMBER, self.text, end) < len(self.text) or not self._read():  # a number may go on
                    self.at = end
                    return value

    def _read(self) -> bool:
        """Read on, as much as is unread, so that a long record is not parsed too often. Returns: False at the end."""
        if self.ended:
            return False
        self.line, self.column = self._place(self.at)
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        try:
            self.text, self.at = self.text[self.at :] + self.decode(data, not data), 0
        except UnicodeDecodeError as error:
            before = len(error.object) - len(data)  # a character that the chunk before left unfinished
            raise _not_utf8(self.path, self.bytes - before + error.start) from error
        self.bytes += len(data)
        self.ended = not data
        return True

    def _place(self, at: int) -> tuple[int, int]:
        newline = self.text.rfind("\n", 0, at)
        return self.line + self.text.count("\n", 0, at), (at - newline if newline >= 0 else self.column + at)

    def _fail(self, reason: str, at: int) -> NoReturn:
        raise _wrong(self.path, *self._place(at), reason)


def _end_of(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return found.end() if found else start


class _Constant(Exception):
    """NaN, Infinity or -Infinity, which Python's parser would take for a number."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not JSON")
        self.name = name

    def place(self, text: str, start: int) -> int:
        """Index of the first of it outside a string, from `start` on."""
        tokens = re.compile(r'"(?:[^"\\]|\\.)*"|' + re.escape(self.name)).finditer(text, start)
        return next((t.start() for t in tokens if t.group() == self.name), start)


def _refuse(name: str) -> NoReturn:
    raise _Constant(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _wrong(path: Path, line: int, column: int, reason: str) -> DataError:
    return DataError("D101", f"{path} line {line} column {column}: {reason}.", "mend the JSON there.")


def _not_utf8(path: Path, byte: int) -> DataError:
    return DataError("D101", f"{path} is not UTF-8 (byte {byte}).", "save it as UTF-8.")
