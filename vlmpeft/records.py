"""Records to conversations: every bad one is found and named before anything trains."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmpeft import fs
from vlmpeft.errors import DataError
from vlmpeft.images import MAX_PIXELS, check_header, open_image
from vlmpeft.normalise import normalised
from vlmpeft.safe_paths import ImageFolder
from vlmpeft.template import IMAGE, Content, Exchange, ImageSlot, parse_question

HUMAN = ("human", "user")
ASSISTANT = ("gpt", "assistant")


@dataclass(frozen=True)
class Conversation:
    """One record.

    Args:
        where: file, index and id, for messages.
        images: files, in order of their marks.
        system: the record's own system prompt, if it has one.
    """

    uid: str
    where: str
    exchanges: tuple[Exchange, ...]
    images: tuple[Path, ...]
    system: str | None = None


class RecordParser:
    """Checks and converts the records of one file.

    Args:
        path: the file, for messages.
        images: folder image names are relative to; nothing outside it is opened.
        auto_image_token: put missing `<image>` marks before the first question instead of refusing.
        verify: "header" reads image headers, "full" decodes, "none" opens no image.
        max_pixels: of an image.

    Attributes: animated: files with several frames or pages, of which the first is shown.
    """

    def __init__(
        self,
        path: Path,
        images: Path | None,
        auto_image_token: bool = False,
        verify: str = "header",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path, self.auto, self.verify, self.max_pixels = path, auto_image_token, verify, max_pixels
        self.animated: set[Path] = set()
        self.folder = ImageFolder(images) if images else None
        self.seen: dict[str, str | DataError] = {}  # a file shown in many records is read once

    def __call__(self, index: int, record: Any) -> Conversation:
        """Raises: DataError D102-D110, D120, all with file, index and id."""
        uid = identifier(record) or str(index)
        where = f'{self.path} record {index} id="{uid}"'
        try:
            if not isinstance(record, Mapping):
                raise DataError("D102", f"a record must be an object, got {type(record).__name__}.")
            found = normalised(record)
            exchanges = self._exchanges(found["conversations"])
            names = self._image_names(found["image"])
            exchanges = self._match_images(exchanges, len(names))
            images = tuple(Path(self._image(name)) for name in names)
            return Conversation(uid, where, tuple(exchanges), images, found["system"])
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
    def _image_names(names: list[Any]) -> list[str | bytes]:
        for name in names:
            if not (isinstance(name, str | bytes) and name):
                raise DataError("D102", f"'image' must be a name, a list of names or absent, got {name!r:.40}.")
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

    def _image(self, image: str | bytes) -> str:
        """The file of a name, or of bytes that are kept as one."""
        key = image if isinstance(image, str) else hashlib.sha256(image).hexdigest()
        if key not in self.seen:
            try:
                self.seen[key] = str(self._checked(self._named(image) if isinstance(image, str) else _kept(key, image)))
            except DataError as error:
                self.seen[key] = error
        found = self.seen[key]
        if isinstance(found, DataError):
            raise found
        return found

    def _named(self, name: str) -> Path:
        if self.folder is None:
            raise DataError("D103", f"image '{name:.200}' is given, but no image folder.", "set data.images=DIR.")
        return self.folder.path(name) if self.verify == "none" else self.folder.find(name)

    def _checked(self, path: Path) -> Path:
        if self.verify != "none" and check_header(path, self.max_pixels).animated:
            self.animated.add(path)
        if self.verify == "full":
            open_image(path, self.max_pixels)
        return path

    def refused_files(self) -> Iterator[Path]:
        """Files, or places of files, that were refused: once they change, the records deserve another look."""
        for name, found in self.seen.items():
            if isinstance(found, DataError) and self.folder is not None and found.code != "D120":
                yield self.folder.path(name)


def identifier(record: Any) -> str | None:
    """The id a record was given."""
    given = record.get("id") if isinstance(record, Mapping) else None
    return None if given is None else str(given)


def _kept(digest: str, data: bytes) -> Path:
    """An image that came inside the data, as a file of the cache."""
    path = fs.cache_dir() / "images" / digest[:2] / digest
    if not path.is_file() or path.stat().st_size != len(data):
        with fs.writing(path) as temporary:
            temporary.write_bytes(data)
    return path
