"""The images of a question file, all of them found before a model is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlmpeft.errors import ConfigError, DataError, EvalError
from vlmpeft.eval.rows import Row
from vlmpeft.safe_paths import ImageFolder


def has_image(question: Row) -> bool:
    """Whether a question is about an image: all are but those whose `text_only` is true."""
    return question.get("text_only") is not True


def with_image(questions: Sequence[Row]) -> list[Row]:
    """The questions that are about an image."""
    return [question for question in questions if has_image(question)]


def resolve_images(questions: Sequence[Row], images: str | Path) -> list[Path]:
    """The image file of each question, inside the folder `images`.

    Raises:
        ConfigError: C102 if `images` is no folder.
        DataError: D120 for a name that leads outside the folder, D103 for a missing file, with the nearest name.
    """
    if not os.path.isdir(images):
        raise ConfigError("C102", f"images={images}: no such folder.", "name the folder that holds the image files.")
    folder = ImageFolder(images)
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for question in questions:
        name = question.get("image")
        if not isinstance(name, str):
            raise EvalError("V602", f"question {question.get('question_id')}: `image` must be text, got {name!r:.80}.")
        if name not in paths:
            paths[name] = folder.path(name)
            if not name or not os.path.isfile(paths[name]):
                missing.append(name)
    if missing:
        more = f" ({len(missing)} images are missing)" if len(missing) > 1 else ""
        message = f"no image '{missing[0]}' in {images}{folder.hint(paths[missing[0]])}{more}"
        fix = _other_folder(images, missing[0]) if len(missing) == len(paths) else "put it there, or mend its name."
        raise DataError("D103", message + ("" if message.endswith("?") else "."), fix)
    return [paths[question["image"]] for question in questions]


def _other_folder(images: str | Path, name: str) -> str:
    """The remedy where no image was found: the folder inside `images` that holds the first of them, if there is one."""
    inside = [entry.name for entry in os.scandir(images) if name and "\0" not in name and _holds(entry, name)]
    return f"did you mean {os.path.join(images, min(inside))}?" if inside else "name the folder that holds the images."


def _holds(entry: os.DirEntry[str], name: str) -> bool:
    return entry.is_dir() and os.path.isfile(os.path.join(entry.path, name))


def check_pictures(paths: Iterable[Path]) -> None:
    """Read the headers of image files, each once. Raises: DataError D104, D105, D106 as `images.check_header`."""
    from vlmpeft.images import check_header

    for path in dict.fromkeys(paths):
        check_header(path)
