"""Rows of questions and answers: read, written, and joined by key, never by position; a mismatch is refused."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vlmpeft import fs
from vlmpeft.errors import ConfigError, EvalError, nearest

Row = Mapping[str, Any]
Key = tuple[str, ...]
SHOWN = 20  # keys listed in one message


def read_rows(path: str | Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read JSON lines; blank lines, a BOM and CRLF are fine. `required` keys hold text, `question_id` also integers.

    Raises:
        ConfigError: C102 if there is no such file.
        EvalError: V602 with file and line for bad JSON, a missing key or a wrong type, and for a file without rows.
    """
    require_file(path)
    rows: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if text:
                    rows.append(_checked(json.loads(text), required))
            except WrongRow as error:
                fix = f"every row has {', '.join(required)}." if required else "write one JSON object a line."
                raise EvalError("V602", f"{path} line {number}: {error}.", fix) from error
            except (ValueError, RecursionError) as error:
                hint = "write one JSON object a line, in UTF-8."
                raise EvalError("V602", f"{path} line {number}: {_reason(error)}.", hint) from error
    if not rows:
        raise EvalError("V602", f"{path} has no rows.", "check that it is the file you meant.")
    return rows


def read_document(path: str | Path) -> Any:
    """One JSON document. Raises: ConfigError C102 if there is no such file, EvalError V602 if it is no JSON."""
    require_file(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise EvalError("V602", f"{path}: {error}.", "give one JSON document, in UTF-8.") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "no text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def require_file(path: str | Path) -> None:
    """Raises: ConfigError C102 for a folder, and where nothing is."""
    if os.path.isdir(path):
        raise ConfigError("C102", f"'{path}' is a folder.", "name a file in it.")
    if not os.path.isfile(path):
        raise ConfigError("C102", f"no file '{path}'.", "check the path.")


class WrongRow(Exception):
    """What is wrong with a row that is JSON."""


def _checked(row: Any, required: Sequence[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise WrongRow(f"expected an object, got {type(row).__name__}")
    for key in required:
        if key not in row:
            raise WrongRow(f"no key '{key}'{nearest(key, row)}")
        allowed = (str, int) if key == "question_id" else (str,)
        if not isinstance(row[key], allowed) or isinstance(row[key], bool):
            kind = "text or an integer" if int in allowed else "text"
            raise WrongRow(f"'{key}' must be {kind}, got {row[key]!r:.80}")
    return row


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all. Raises: CheckpointError K201 when the disk is full."""
    _write(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, all or none. Raises: CheckpointError K201 when the disk is full."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    fs.write_text(path, text.encode("utf-8", "backslashreplace").decode())  # a lone surrogate becomes its JSON escape


def join(questions: Sequence[Row], answers: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair each question with its answer, in the order of the questions.

    The key is `question_id`, preceded by `setting` where both sides have one. Answers without any id join by exact
    (image, question), as far as they carry both.

    Raises:
        EvalError: V601 for missing, extra or repeated keys and for an answer given to another question; V602 for an id
            that is neither an integer nor text.
    """
    fields = _key_fields(questions, answers)
    asked = [tuple(_part(q, field) for field in fields) for q in questions]
    given = [tuple(_part(a, "question" if field == "text" else field) for field in fields) for a in answers]
    _check_keys(asked, given)
    by_key = dict(zip(given, answers, strict=True))
    pairs = [(question, by_key[key]) for question, key in zip(questions, asked, strict=True)]
    _check_pairs(pairs)
    return pairs


def answer_text(answer: Row) -> str:
    """The text of an answer: `text`, or `answer` as in the official POPE files. Raises: EvalError V602 if neither."""
    text = answer.get("text", answer.get("answer"))
    if not isinstance(text, str):
        message = f"the answer {_name(answer)} has no text, but {text!r:.80} (its keys: {', '.join(answer)})."
        raise EvalError("V602", message, "give `text` or `answer`.")
    return text


def _key_fields(questions: Sequence[Row], answers: Sequence[Row]) -> tuple[str, ...]:
    nameless = [i for i, answer in enumerate(answers, start=1) if "question_id" not in answer]
    fields: tuple[str, ...] = ("question_id",)
    if nameless and len(nameless) == len(answers) and all("image" in a and "question" in a for a in answers):
        fields = ("image", "text")
    elif nameless:
        rows = _listed([(str(number),) for number in nameless])
        raise EvalError(
            "V601",
            f"answers without question_id: rows {rows}; nothing is joined by position.",
            "give every answer its `question_id`, or every answer its `image` and `question`.",
        )
    if all("setting" in q for q in questions) and any("setting" in a for a in answers):
        fields = ("setting", *fields)
    return fields


def _part(row: Row, field: str) -> str:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise EvalError("V602", f"`{field}` must be an integer or text, got {value!r} in {dict(row)!r:.200}.")
    return str(value)


def _check_keys(asked: Sequence[Key], given: Sequence[Key]) -> None:
    questions, answers = Counter(asked), Counter(given)
    faults = {
        "repeated questions": [key for key, n in questions.items() if n > 1],
        "missing answers": [key for key in questions if key not in answers],
        "extra answers": [key for key in answers if key not in questions],
        "repeated answers": [key for key, n in answers.items() if n > 1],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {fault}: {_listed(keys)}" for fault, keys in faults.items() if keys)
        raise EvalError(
            "V601",
            f"{len(asked)} questions and {len(given)} answers do not match: {found}.",
            "score the answers against the files they were made for; ids that repeat across files need a `setting`.",
        )


def _check_pairs(pairs: Sequence[tuple[Row, Row]]) -> None:
    """Equal ids are not enough: POPE numbers every file from 1, so the question or image, where given, must agree."""
    if pairs and all(q.get("text") and q.get("text") == a.get("text") for q, a in pairs):
        raise EvalError("V601", "the answers are the questions themselves.", "give the file that a model answered.")
    strangers = [(q, a) for q, a in pairs if not _agree(q, a)]
    if strangers:
        question, answer = strangers[0]
        raise EvalError(
            "V601",
            f"{len(strangers)} of {len(pairs)} answers were given to another question under the same id; the first, "
            f"{_name(question)}, asks {question.get('text')!r} about {question.get('image')!r} but its answer is to "
            f"{answer.get('prompt', answer.get('question'))!r} about {answer.get('image')!r}.",
            "score the answers against the question file they were made for.",
        )


def _agree(question: Row, answer: Row) -> bool:
    asked, given = question.get("text"), answer.get("prompt", answer.get("question"))
    if isinstance(asked, str) and isinstance(given, str) and asked not in given and given not in asked:
        return False  # containment, since the prompt may add a suffix, and so may the question (LLaVA's file does)
    asked, given = question.get("image"), answer.get("image")
    return not (isinstance(asked, str) and isinstance(given, str)) or (
        PurePosixPath(asked).name == PurePosixPath(given).name
    )


def _listed(keys: Sequence[Key]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join("/".join(key) for key in keys[:SHOWN]) + more


def _name(row: Row) -> str:
    return "/".join(str(row[field]) for field in ("setting", "question_id") if field in row) or "without id"
