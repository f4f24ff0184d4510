"""Records of every accepted shape as LLaVA writes them, so that one parser checks them all."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlmpeft.errors import DataError

PAIRS = (("instruction", "output"), ("question", "answer"), ("prompt", "response"))  # one question, one answer
LISTS = ("conversations", "messages")
ACCEPTED = (
    "conversations (turns of from, value) | messages (of role, content) | instruction, input, output | "
    "question, answer | prompt, response; with image or images where there are some"
)
SOURCES = ("image_url", "image", "path", "url")  # keys of an image part, most telling first
LIKE_IMAGE = re.compile(
    r"(image|img|picture|photo)s?([ _-]?(path|file|file_?name|name|url)s?)?|file_?name", re.IGNORECASE
)
MARK = re.compile(r"(?<!\\)<image>")


def fits(columns: Collection[str]) -> bool:
    """Whether keys or columns hold a conversation."""
    return any(name in columns for name in LISTS) or any(set(pair) <= set(columns) for pair in PAIRS)


def unknown_shape(columns: Sequence[str]) -> str:
    """What to say of keys or columns that hold none."""
    return f"{', '.join(columns) or 'no columns'}: no conversation among them; accepted: {ACCEPTED}."


def normalised(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as {"conversations": turns, "image": names or bytes of images, "system": prompt or None}.

    Raises: DataError D102 for a shape that is not accepted. What it holds is checked by `RecordParser`.
    """
    if not fits(record):
        raise DataError("D102", unknown_shape([str(k) for k in record]), "rename the keys.")
    if record.get("image") is not None and record.get("images") is not None:
        raise DataError("D102", "both 'image' and 'images' are given.", "keep one of them; it may hold a list.")
    images = _images(record["image"] if record.get("image") is not None else record.get("images"))
    shape = _shape(record)
    if shape == ("messages",):
        turns, images = _messages(_from_json(record["messages"]), images)
    elif len(shape) == 2:
        turns = _pair(record, *shape, images)
    else:
        turns = _from_json(record.get("conversations"))
    if not images:
        _refuse_overlooked(record)
    system = record.get("system")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and turns[0].get("from") == "system":
        system, turns = turns[0].get("value"), turns[1:]
    if system is not None and not isinstance(system, str):
        raise DataError("D102", f"the system prompt must be text, got {system!r:.40}.")
    return {"conversations": turns, "image": images, "system": system}


def _shape(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that hold the conversation. Raises: DataError D102 if there are several: all but one would be lost."""
    there = [keys for keys in (*((name,) for name in LISTS), *PAIRS) if set(keys) <= record.keys()]
    given = [keys for keys in there if any(record[key] not in (None, "", []) for key in keys)]
    if len(given) > 1:
        both = " and ".join(f"'{', '.join(keys)}'" for keys in given)
        raise DataError("D102", f"{both} are given, each a conversation.", "keep one of them.")
    return (given or there)[0]


def _refuse_overlooked(record: Mapping[str, Any]) -> None:
    """Raise DataError D102 if a record without images has one under a name that nothing reads."""
    for key, value in record.items():
        if value not in (None, "", []) and key not in ("image", "images") and LIKE_IMAGE.fullmatch(str(key).strip()):
            message = f"'{key}' looks like an image, but images are read from 'image' or 'images' alone."
            raise DataError("D102", message, "rename the key or column, or take it out.")


def _from_json(value: Any) -> Any:
    """A list that a cell of a table holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _images(value: Any) -> list[Any]:
    """A name, bytes, a `datasets` image or a list of them, as a list."""
    value = _from_json(value)
    if isinstance(value, list):
        return [_image(v) for v in value]
    return [] if value is None else [_image(value)]


def _image(value: Any) -> Any:
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:  # datasets.Image
        return value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(";base64,")[2], validate=True)
        except binascii.Error as error:
            raise DataError("D102", f"image '{value:.30}' is not base64: {error}.") from error
    return value


def _pair(record: Mapping[str, Any], question: str, answer: str, images: list[Any]) -> list[dict[str, Any]]:
    """Turns of a record with one question and one answer; images that it does not mark come first."""
    for key in (question, answer):
        if not isinstance(record[key], str | None):
            raise DataError("D102", f"'{key}' must be text, got {record[key]!r:.40}.")
    asked = record[question] or ""
    if question == "instruction" and record.get("input"):
        asked = f"{asked}\n{record['input']}"
    if not MARK.search(asked):
        asked = "<image>\n" * len(images) + asked
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": record[answer] or ""}]


def _messages(messages: Any, images: list[Any]) -> tuple[Any, list[Any]]:
    """Messages as turns, and the images of the record: those the messages refer to, or those given beside them."""
    if not isinstance(messages, list):
        raise DataError("D102", f"'messages' must be a list, got {messages!r:.40}.")
    turns, found = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str | list):
            raise DataError("D102", f"message {i} must hold 'role' and 'content', got {message!r:.60}.")
        content = message["content"]
        if isinstance(content, list):
            content, shown = _content(content, i, literal=message.get("role") != "user")
            found += shown
        turns.append({"from": message.get("role"), "value": content})
    referred = [image for image in found if image is not None]
    if referred and (images or len(referred) < len(found)):
        raise DataError("D102", "some images are in the messages, some beside them.", "keep them in one place.")
    return turns, referred or images


def _content(parts: list[Any], index: int, literal: bool) -> tuple[str, list[Any]]:
    """Text of OpenAI-style parts with a mark for each image. Args: literal: where `<image>` is no mark anyway.

    Returns: text; the images, None for one that is given beside the messages.
    """
    text, images = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"] if literal else MARK.sub(r"\\<image>", part["text"])
        elif kind in ("image", "image_url"):
            source = next((part[key] for key in SOURCES if part.get(key) is not None), None)
            source = source.get("url") if isinstance(source, Mapping) and "url" in source else source
            images.append(_image(source))
            text += "<image>"
        else:
            raise DataError("D102", f"message {index}: a part must be of type text or image, got {part!r:.60}.")
    return text, images
