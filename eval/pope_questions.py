"""POPE's question files: one a setting, or one for all; and the two revisions of `random`, told by their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import ConfigError, EvalError
from vlmpeft.eval.pope_score import REVISIONS, SETTINGS, label_of
from vlmpeft.eval.rows import Row, read_rows

QUESTION_KEYS = ("question_id", "image", "text", "label")


def read_questions(files: str) -> list[dict[str, Any]]:
    """Read comma-separated question files; of several, each row gets its file's name as `setting`.

    Rows of a random file of one of the two known lengths carry that as `revision`, which the metrics repeat.
    Raises: ConfigError C102 for a missing file or two of one name; EvalError V602 with file and line for a wrong row.
    """
    if not all(files.split(",")):
        raise ConfigError("C102", f"questions={files}: a name is missing beside a comma.", "take the comma away.")
    paths = [Path(file) for file in files.split(",")]
    if len({path.stem for path in paths}) < len(paths):
        raise ConfigError("C102", f"questions={files}: two files share a name.", "rename one; the name is the setting.")
    questions: list[dict[str, Any]] = []
    for path in paths:
        rows = read_rows(path, QUESTION_KEYS)
        for row in rows:
            label_of(row)
        known = {"setting": path.stem} if len(paths) > 1 else {}
        if "random" in path.stem.lower() and len(rows) in REVISIONS:
            known["revision"] = REVISIONS[len(rows)]
        questions += [{**row, **known} for row in rows]
    return questions


def refuse_other_setting(files: str, answers: Sequence[Row]) -> None:
    """Ids are the same in every file, so that answers to one setting would pass for those to another.

    Raises: EvalError V601 where a single question file is named after one of POPE's settings, an answer after another.
    """
    asked = None if "," in files else _kind(Path(files).stem)
    for answer in answers:
        given = _kind(str(answer.get("setting", "")))
        if asked and given and asked != given:
            message = f"the answers are to the setting '{answer['setting']}', the questions of '{files}'."
            raise EvalError("V601", message, f"give the questions of {given}, or the files of all settings.")


def _kind(name: str) -> str | None:
    return next((setting for setting in sorted(SETTINGS) if setting in name.lower()), None)
