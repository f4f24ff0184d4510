"""Image names of a question file to files inside one folder; nothing outside it is ever opened."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlmpeft.errors import ConfigError, DataError, EvalError
from vlmpeft.eval.rows import Row


def resolve_images(questions: Sequence[Row], images: str | Path) -> list[Path]:
    """The image file of each question, inside the folder `images`.

    Raises:
        ConfigError: C102 if `images` is no folder.
        DataError: D120 for a name that leads outside the folder, D103 for a missing file, with the nearest name.
    """
    if not os.path.isdir(images):
        raise ConfigError("C102", f"images={images}: no such folder.", "name the folder that holds the image files.")
    root = os.path.realpath(images)
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for question in questions:
        name = question.get("image")
        if not isinstance(name, str):
            raise EvalError("V602", f"question {question.get('question_id')}: `image` must be text, got {name!r:.80}.")
        if name not in paths:
            paths[name] = Path(_inside(name, root))
            if not name or not os.path.isfile(paths[name]):
                missing.append(name)
    if missing:
        more = f" ({len(missing)} images are missing)" if len(missing) > 1 else ""
        raise DataError("D103", f"no image '{missing[0]}' in {images}{_nearest_file(paths[missing[0]], root)}{more}.")
    return [paths[question["image"]] for question in questions]


def _inside(name: str, root: str) -> str:
    """The real path of `name` under `root`, without opening anything. Raises: DataError D120 if it is elsewhere."""
    try:
        target = os.path.realpath(os.path.join(root, name))
        targets = [target, os.path.realpath(os.path.join(root, name.replace("\\", "/")))]
    except ValueError:  # a NUL or a lone surrogate: no file can have that name
        return os.path.join(root, re.sub(r"[\\/]", "_", name))
    absolute = re.match(r"/|\\|[A-Za-z]:\\|[A-Za-z][A-Za-z0-9+.-]*:/", name)
    if absolute or any(os.path.commonpath([root, t]) != root for t in targets):
        raise DataError("D120", f"image '{name}' leads outside the images folder.", "use a name inside that folder.")
    return target


def _nearest_file(path: Path, root: str) -> str:
    inside = str(path) != root and path.parent.is_dir()
    known = os.listdir(path.parent if inside else root)
    close = [k for k in known if k.lower() == path.name.lower()] or difflib.get_close_matches(path.name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f" ({len(known)} files there)"
