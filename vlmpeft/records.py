"""LLaVA conversation files to conversations: every bad record is found and named before a model loads."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmpeft.errors import DataError
from vlmpeft.images import check_header, open_image
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
    elif start == "{":
        rows = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
        records = [_parse(line, path, n) for n, line in rows]
    else:
        raise DataError("D101", f"{path} is neither a JSON list nor JSON lines.", "write a list of records.")
    if not records:
        raise DataError("D101", f"{path} holds no record.")
    return list(records)


def _parse(text: str, path: Path, line: int) -> Any:
    def refuse(constant: str) -> Any:
        raise DataError("D101", f"{path}: {constant} is not JSON.", "write null or a string.")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        whole = "" if line == 1 and error.lineno > 1 else " (a JSON-lines file needs one whole record a line)" if line > 1 else ""
        raise DataError("D101", f"{path} line {line + error.lineno - 1} column {error.colno}: {error.msg}{whole}.", "mend the JSON there.") from error
    except (RecursionError, ValueError) as error:
        raise DataError("D101", f"{path} line {line}: {type(error).__name__} while reading.", "mend the JSON there.") from error


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
        self.root = images.resolve() if images else None
        self.seen: dict[Path, DataError | None] = {}

    def __call__(self, index: int, record: Any) -> Conversation:
        """Raises: DataError D102-D110, D120, all with file, index and id."""
        uid = str(record.get("id", index)) if isinstance(record, Mapping) else str(index)
        where = f'{self.path} record {index} id="{uid}"'
        try:
            if not isinstance(record, Mapping):
                raise DataError("D102", f"a record must be an object, got {type(record).__name__}.")
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
                raise DataError("D102", f"turn {i} is from '{turn['from']}', expected '{expected[0]}': human and gpt alternate.")
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
            text = exchanges[0].question
            return [Exchange((*front, "\n", *text), exchanges[0].answer), *exchanges[1:]]
        if images == 0:
            raise DataError("D108", f"{marks} <image> in a record without 'image'.", r"add the image, or write \<image> for the literal text.")
        fix = "set data.auto_image_token=true to put it first." if marks == 0 else "write one <image> for each image."
        raise DataError("D107", f"{images} images but {marks} <image> in the questions.", fix)

    def _image(self, name: str) -> Path:
        if self.root is None:
            raise DataError("D103", f'image "{name}" is given, but no image folder.', "set data.images=DIR.")
        if "://" in name or "\0" in name:
            raise DataError("D120", f'image "{name}" is not a file name.', "put the file into data.images.")
        path = self.root / name
        if path not in self.seen:
            self.seen[path] = None
            try:
                self._check(name, path)
            except DataError as error:
                self.seen[path] = error
        if (error := self.seen[path]) is not None:
            raise error
        return path

    def _check(self, name: str, path: Path) -> None:
        assert_inside(self.root, path, name)
        try:
            present = path.is_file()
        except OSError as error:
            raise DataError("D103", f'image "{name:.80}": {error.strerror}.') from error
        if not present:
            raise DataError("D103", missing_image(path, name), "check data.images and the record's name.")
        if self.verify == "full":
            open_image(path)
        else:
            check_header(path)


def assert_inside(root: Path | None, path: Path, name: str) -> None:
    """Refuse a path that leaves its folder. Raises: DataError D120."""
    if root is None or not path.resolve().is_relative_to(root):
        raise DataError("D120", f'image "{name}" leads outside {root}.', "put the file into data.images.")


def missing_image(path: Path, name: str) -> str:
    """What to say of an image that is not there, with the closest name in its folder."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    return f'image "{name}" is not in {path.parent}{hint}.'
