"""MMBench (arXiv:2307.06281): choices asked once (mode=vanilla), or in every rotation of the options (mode=circular).

Ask and score a model:
  python -m vlmpeft.eval.mmbench model=DIR data=FILE.tsv out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.mmbench data=FILE.tsv answers=FILE [key=value ...]

data: the published TSV: index, question, hint, A, B, C, D, answer, category, l2-category, image (base64).
answers: JSON lines with question_id (the index; the k-th rotation adds k million) and text.
mode: circular (the official figure) counts a question only if it is right in every rotation; vanilla asks it once.
parser: official (VLMEvalKit's exact matching, without its judge model), strict.
"""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval.choices import (
    LETTER,
    Item,
    Verdict,
    accuracy,
    judge_with,
    lettered,
    literal,
    option_lines,
    parse_strict,
    parse_vlmevalkit,
    tally,
)
from vlmpeft.eval.choices_run import ChoiceBenchmark, command
from vlmpeft.eval.rows import require_file

ROUND = 1_000_000  # VLMEvalKit: rows whose index is equal modulo this are rotations of one question
ABSENT = ("", "nan", "none")  # of an option or a hint, in any case; llava/eval/model_vqa_mmbench.py
LONGEST_CELL = 1 << 30
REFERENCE = 64  # characters: a shorter `image` is the index of the row that holds it


def read_table(path: str) -> list[dict[str, str]]:
    """Rows of a TSV below its header. Raises: ConfigError C102 if there is no such file, EvalError V602."""
    require_file(path)
    limit = csv.field_size_limit(LONGEST_CELL)  # an image is one cell
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", restval=""))
    except (csv.Error, UnicodeDecodeError) as error:
        reason = "no text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise EvalError("V602", f"{path}: {reason}.", "give MMBench's TSV file.") from error
    finally:
        csv.field_size_limit(limit)
    missing = [name for name in ("index", "question", "A", "B") if not rows or name not in rows[0]]
    if missing:
        raise EvalError("V602", f"{path} has no column {', '.join(missing)}, or no rows.", "give MMBench's TSV file.")
    return rows


def read_items(arguments: Mapping[str, Any], images: bool) -> list[Item]:
    """The rows, and in mode=circular their rotations, unless the file holds them itself."""
    if arguments["mode"] not in ("circular", "vanilla"):
        raise ConfigError("C102", f"mode={arguments['mode']}: no such mode.", "choose circular or vanilla.")
    rows = read_table(arguments["data"])
    if not all(row["index"].isdecimal() for row in rows):
        raise EvalError("V602", f"{arguments['data']}: `index` must be a whole number.", "give MMBench's TSV file.")
    indices = [int(row["index"]) for row in rows]
    unrotated = {index for index in indices if index < ROUND}
    orphans = [index for index in indices if index % ROUND not in unrotated]
    if orphans:
        raise EvalError("V602", f"{len(orphans)} rotations have no unrotated row; the first is {orphans[0]}.")
    if arguments["mode"] == "vanilla":
        rows = [row for row in rows if int(row["index"]) in unrotated]
    turn = arguments["mode"] == "circular" and len(unrotated) == len(set(indices))
    pictures = {row["index"]: row.get("image", "") for row in rows} if images else {}
    return [item for row in rows for item in _items(row, pictures, arguments["suffix"], turn)]


def _items(row: Mapping[str, str], pictures: Mapping[str, str], suffix: str, turn: bool) -> list[Item]:
    """A row as an item; with `turn` as many as it has options, which move up by 0, 1, 2, ... places."""
    index, answer, hint = row["index"], row.get("answer", ""), row.get("hint", "")
    texts = list(_given(row))
    options = lettered(texts, index)
    hidden = answer.strip().lower() in ABSENT
    if not hidden and answer not in options:
        raise EvalError("V602", f"question {index}: its answer {answer!r:.80} is none of {', '.join(options)}.")
    stem = row["question"] if hint.lower() in ABSENT else f"{hint}\n{row['question']}"
    images = (_picture(row, pictures),) if pictures else ()
    named = {"categories": row.get("category"), "abilities": row.get("l2-category")}
    groups = {kind: name for kind, name in named.items() if name}
    items = []
    for k in range(len(texts) if turn else 1):
        turned = lettered(texts[k:] + texts[:k], index)
        gold = None if hidden else list(options)[(list(options).index(answer) - k) % len(texts)]
        prompt = literal(f"{stem}\n{option_lines(turned)}{suffix}")
        items.append(Item(str(int(index) + k * ROUND), turned, gold, prompt, images, groups))
    return items


def _given(row: Mapping[str, str]) -> Iterator[str]:
    """The options up to the first that is absent."""
    for letter in "ABCDEFGH":
        if row.get(letter, "").lower() in ABSENT:
            return
        yield row[letter]


def _picture(row: Mapping[str, str], pictures: Mapping[str, str]) -> bytes:
    code = row.get("image", "")
    if len(code) <= REFERENCE:
        code = pictures.get(code, code)
    try:
        picture = base64.b64decode(code, validate=True)
    except (binascii.Error, ValueError):
        picture = b""
    if not picture:
        raise EvalError("V602", f"question {row['index']}: `image` is no base64.", "download the file again.")
    return picture


def summarise(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """As `tally` over questions, each right only if all of its rotations are; unparsable and the like count answers.

    Returns: also `answers`, how many were judged, and `vanilla`, the accuracy of the unrotated ones.
    """
    rounds: dict[int, list[Verdict]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        rounds.setdefault(int(item.id) % ROUND, []).append(verdict)
    asked = {int(item.id): (item, verdict) for item, verdict in zip(items, verdicts, strict=True)}
    questions = [asked[index][0] for index in rounds]
    merged = [replace(asked[index][1], correct=all(v.correct for v in found)) for index, found in rounds.items()]
    answers = tally(items, verdicts)
    counts = {key: answers[key] for key in ("unparsable", "by_chance", "empty")}
    whole = {**tally(questions, merged), **counts, "judged": len(items)}
    if "accuracy" not in whole:
        return whole
    return {**whole, "vanilla": accuracy([asked[index][1].correct for index in rounds])["accuracy"]}


BENCHMARK = ChoiceBenchmark(
    name="mmbench",
    doc=__doc__ or "",
    read=read_items,
    judges={"official": judge_with(parse_vlmevalkit), "strict": judge_with(parse_strict)},
    options={"mode": "circular", "suffix": LETTER},
    summarise=summarise,
)


def main(argv: Sequence[str]) -> None:
    """Score given answers, or ask a model and score it."""
    command(argv, BENCHMARK)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
