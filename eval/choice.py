"""Multiple choice on your own questions.

Ask and score a model:
  python -m vlmpeft.eval.choice model=DIR data=FILE images=DIR out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.choice data=FILE answers=FILE [key=value ...]

data: JSON lines with id, question, options (a list), answer (a letter), and if you like image (a file name or a list
of such) and category. `<image 1>` in a question says where the first image belongs; images that no question names
stand in front. answers: JSON lines with id and text.
parser: vlmevalkit (finds a letter in a sentence), mmmu (decides by chance what it cannot read), scienceqa, strict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval.choices import (
    LETTER,
    Item,
    Predictions,
    judge_with,
    lettered,
    literal,
    option_lines,
    parse_strict,
    parse_vlmevalkit,
    score_items,
)
from vlmpeft.eval.choices_run import ChoiceBenchmark, command
from vlmpeft.eval.mmmu_parse import parse_multi_choice
from vlmpeft.eval.paths import resolve_images
from vlmpeft.eval.rows import Row, read_rows
from vlmpeft.eval.scienceqa import parse_llava

PLACE = re.compile(r"<image ([0-9]{1,3})>")


def item_of(row: Row, paths: Sequence[Path] = (), suffix: str = LETTER) -> Item:
    """A row as an item. Raises: EvalError V602 for a row without options, or whose answer is none of their letters."""
    item_id, found = _id(row), row.get("options")
    if not isinstance(found, list):
        raise EvalError("V602", f"question {item_id}: options must be a list, got {found!r:.80}.")
    options = lettered(found, item_id)
    if row.get("answer") not in options:
        fault = f"question {item_id}: answer must be one of {', '.join(options)}, got {row.get('answer')!r:.80}."
        raise EvalError("V602", fault)
    prompt, images = _placed(literal(f"{row['question']}\n{option_lines(options)}{suffix}"), paths)
    groups = {"categories": str(row["category"])} if "category" in row else {}
    return Item(item_id, options, row["answer"], prompt, images, groups)


def _id(row: Row) -> str:
    item_id = row.get("id", row.get("question_id"))
    if isinstance(item_id, bool) or not isinstance(item_id, (int, str)):
        raise EvalError("V602", f"`id` must be an integer or text, got {item_id!r:.80}.", "give every question one.")
    return str(item_id)


def _placed(text: str, paths: Sequence[Path]) -> tuple[str, tuple[Path, ...]]:
    """A mark where an image is named, and the images in the order of the marks; those not named go in front."""
    named: list[int] = []

    def mark(place: re.Match[str]) -> str:
        number = int(place[1])
        if not 1 <= number <= len(paths):
            return place[0]
        named.append(number - 1)
        return "<image>"

    marked = PLACE.sub(mark, text)
    rest = [n for n in range(len(paths)) if n not in named]
    return "<image>\n" * len(rest) + marked, tuple(paths[n] for n in (*rest, *named))


def _names(row: Row) -> list[Any]:
    image = row.get("image", [])
    return list(image) if isinstance(image, list) else [image]


def read_items(arguments: Mapping[str, Any], images: bool) -> list[Item]:
    """The questions of data=. Raises: ConfigError C102, EvalError V602, DataError D103 or D120 for an image."""
    rows = read_rows(arguments["data"], ("question",))
    if not images:
        return [item_of(row) for row in rows]
    asked = [{"question_id": _id(row), "image": name} for row in rows for name in _names(row)]
    if asked and not arguments["images"]:
        raise ConfigError("C102", "images is not given.", "add images=DIR, the folder of the image files.")
    paths = iter(resolve_images(asked, arguments["images"]) if asked else ())
    return [item_of(row, [next(paths) for _ in _names(row)], arguments["suffix"]) for row in rows]


def score(predictions: Predictions, items: Sequence[Row], parser: str = "vlmevalkit") -> dict[str, Any]:
    """Join by id and score. Returns: as `choices.tally`. Raises: EvalError V601, V602."""
    return score_items([item_of(row) for row in items], predictions, BENCHMARK.judge(parser))


BENCHMARK = ChoiceBenchmark(
    name="choice",
    doc=__doc__ or "",
    read=read_items,
    judges={
        "vlmevalkit": judge_with(parse_vlmevalkit),
        "mmmu": judge_with(parse_multi_choice, chance=True),
        "scienceqa": judge_with(parse_llava),
        "strict": judge_with(parse_strict),
    },
    options={"images": "", "suffix": LETTER},
)


def main(argv: Sequence[str]) -> None:
    """Score given answers, or ask a model and score it."""
    command(argv, BENCHMARK)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
