"""LLaVA conversation files to conversations: every bad record is found and named before a model loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmpeft.errors import DataError
from vlmpeft.images import check_header, open_image
from vlmpeft.safe_paths import ImageFolder
from vlmpeft.template import IMAGE, Content, Exchange, ImageSlot, parse_question

HUMAN = ("human", "user")
ASSISTANT = ("gpt", "assistant")


@dataclass(frozen=True)
class Conversation:
    """One record. where: file, index and id, for messages. images: files, in order of their marks."""

    uid: str
    where: str
    exchanges: tuple[Exchange, ...]
    images: tuple[Path, ...]


def read_records(path: Path) -> list[Any]:
    """Records of a JSON list or JSON-lines file; a byte-order mark is accepted.

    Raises: DataError D101 with file, line and column.
    """
    if not path.is_file():
        raise DataError("D101", f"no data file {path}.", "check data.pretrain and data.instruct.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("D101", f"{path} is not UTF-8 (byte {error.start}).", "save it as UTF-8.") from error
    start = text.lstrip()[:1]
    if start == "[":
        records = _parse(text, path, 1)
    elif start == "{":  # only line feeds end a record: a string may hold other line separators, as U+2028
        rows = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        records = [_parse(line, path, n, " (a JSON-lines file needs one whole record a line)") for n, line in rows]
    else:
        raise DataError("D101", f"{path} is neither a JSON list nor JSON lines.", "write a list of records.")
    if not records:
        raise DataError("D101", f"{path} holds no record.", "write a list of records.")
    return list(records)


def _parse(text: str, path: Path, line: int, hint: str = "") -> Any:
    def refuse(constant: str) -> Any:
        raise _Constant(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        number, column, reason = line + error.lineno - 1, error.colno, error.msg + hint
    except _Constant as error:
        number, column = _place(text, str(error), line)
        reason = f"{error} is not JSON"
    except (RecursionError, ValueError) as error:
        number, column, reason = line, 1, "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise DataError("D101", f"{path} line {number} column {column}: {reason}.", "mend the JSON there.")


class _Constant(Exception):
    """NaN, Infinity or -Infinity, which Python's parser would take for a number."""


def _place(text: str, constant: str, line: int) -> tuple[int, int]:
    """Line and column of the first `constant` outside a string."""
    tokens = re.finditer(r'"(?:[^"\\]|\\.)*"|' + re.escape(constant), text)
    start = next((t.start() for t in tokens if t.group() == constant), 0)
    return line + text.count("\n", 0, start), start - text.rfind("\n", 0, start)


class RecordParser:
    """Checks and converts the records of one file.

    Args:
        path: the file, for messages.
        images: folder image names are relative to; nothing outside it is opened.
        auto_image_token: put missing `<image>` marks before the first question instead of refusing.
        verify: "header" reads image headers, "full" decodes.
    """

    def __init__(self, path: Path, images: Path | None, auto_image_token: bool = False, verify: str = "header") -> None:
        self.path, self.auto, self.verify = path, auto_image_token, verify
        self.folder = ImageFolder(images) if images else None
        self.seen: dict[str, Path | DataError] = {}  # a file shown in many records is read once

    def __call__(self, index: int, record: Any) -> Conversation:
        """Raises: DataError D102-D110, D120, all with file, index and id."""
        uid = str(record.get("id", index)) if isinstance(record, Mapping) else str(index)
        where = f'{self.path} record {index} id="{uid}"'
        try:
            if not isinstance(record, Mapping):
                raise DataError("D102", f"a record must be an object, got {type(record).__name__}.")
            if "images" in record and "image" not in record:
                raise DataError("D102", "no key 'image', but 'images'.", "call it image; it may hold a list.")
            exchanges = self._exchanges(record.get("conversations"))
            names = self._image_names(record.get("image"))
            exchanges = self._match_images(exchanges, len(names))
            return Conversation(uid, where, tuple(exchanges), tuple(self._image(n) for n in names))
        except DataError as error:
            raise DataError(error.code, f"{where}: {error.message}", error.fix) from error

    def _exchanges(self, turns: Any) -> list[Exchange]:
        if not isinstance(turns, list) or not turns:
            raise DataError("D102", f"'conversations' must be a list of turns, got {turns!r:.40}.")
        for i, turn in enumerate(turns):
            expected = HUMAN if i % 2 == 0 else ASSISTANT
            if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
                raise DataError("D102", f"turn {i} must hold 'from' and a text 'value', got {turn!r:.60}.")
            if turn.get("from") not in HUMAN + ASSISTANT:
                raise DataError("D102", f"turn {i} is from '{turn.get('from')}'.", "use human or gpt.")
            if turn["from"] not in expected:
                message = f"turn {i} is from '{turn['from']}', expected '{expected[0]}'."
                raise DataError("D102", message, "let human and gpt alternate, human first.")
        if len(turns) % 2:
            raise DataError("D102", f"{len(turns)} turns: the last question has no answer.")
        for i, turn in enumerate(turns[1::2]):
            if not turn["value"].strip():
                raise DataError("D110", f"answer {i} is empty, so there is nothing to learn.", "remove the turn.")
        return [Exchange(parse_question(q["value"]), a["value"]) for q, a in zip(turns[::2], turns[1::2], strict=True)]

    @staticmethod
    def _image_names(value: Any) -> list[str]:
        names = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise DataError("D102", f"'image' must be a name, a list of names or absent, got {value!r:.40}.")
        return names

    def _match_images(self, exchanges: list[Exchange], images: int) -> list[Exchange]:
        marks = sum(isinstance(c, ImageSlot) for e in exchanges for c in e.question)
        if marks == images:
            return exchanges
        if marks == 0 and self.auto:
            front: Content = (IMAGE,) * images
            text = "".join(c for c in exchanges[0].question if isinstance(c, str)).strip()
            return [Exchange((*front, "\n" + text), exchanges[0].answer), *exchanges[1:]]
        if images == 0:
            fix = r"add the image, or write \<image> for the literal text."
            raise DataError("D108", f"{marks} <image> in a record without 'image'.", fix)
        fix = "set data.auto_image_token=true to put it first." if marks == 0 else "write one <image> for each image."
        raise DataError("D107", f"{images} images but {marks} <image> in the questions.", fix)

    def _image(self, name: str) -> Path:
        if self.folder is None:
            raise DataError("D103", f"image '{name:.200}' is given, but no image folder.", "set data.images=DIR.")
        if name not in self.seen:
            try:
                self.seen[name] = self._checked(self.folder, name)
            except DataError as error:
                self.seen[name] = error
        found = self.seen[name]
        if isinstance(found, DataError):
            raise found
        return found

    def _checked(self, folder: ImageFolder, name: str) -> Path:
        path = folder.find(name)
        if self.verify == "full":
            open_image(path)
        else:
            check_header(path)
        return path
