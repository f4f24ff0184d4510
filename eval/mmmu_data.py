"""MMMU's parquet files to items: columns, prompts and the places of images in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import ConfigError, EvalError
from vlmpeft.eval.choices import LETTER, Item, lettered, literal, option_lines
from vlmpeft.eval.mmmu_parse import gold_texts
from vlmpeft.eval.rows import Row

SHORT = "Answer the question using a single word or phrase."
SPLITS = {"val": "validation"}  # other names are as they are
DOMAINS = {  # MMMU eval/data_utils.py
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
IMAGES = tuple(f"image_{n}" for n in range(1, 8))
COLUMNS = ("id", "question", "options", "answer", "question_type")
PLACE = re.compile(r"<image ([1-7])>")


def subject_of(item_id: str) -> str:
    """`validation_Art_Theory_3` to `Art_Theory`: what stands between the first and the last underscore."""
    return item_id.partition("_")[2].rpartition("_")[0]


def item_of(row: Row, mode: str = "first", prompt: str = "official") -> Item:
    """A row of MMMU's columns as an item. Raises: EvalError V602 for a row that is none of MMMU's."""
    item_id, answer = row.get("id"), row.get("answer")
    if not isinstance(item_id, str):
        raise EvalError("V602", f"`id` must be text, got {item_id!r:.80}.", "give MMMU's columns.")
    choice = row.get("question_type") == "multiple-choice"
    options = lettered(_list(row.get("options"), item_id), item_id) if choice else {}
    hidden = answer in (None, "", "?")  # the test split's answers stay with the owners
    if not hidden and choice and answer not in options:
        raise EvalError("V602", f"question {item_id}: its answer {answer!r:.80} is none of {', '.join(options)}.")
    text, images = _placed(_text(str(row.get("question", "")), options, prompt), row, mode)
    subject = subject_of(item_id)
    groups = {"subjects": subject, "domains": DOMAIN_OF.get(subject, "other")}
    gold = None if hidden or answer is None else str(answer) if choice else gold_texts(answer)
    return Item(item_id, options, gold, text, images, groups)


def _list(options: Any, item_id: str) -> list[str]:
    """The options, in the parquet files the repr of a list."""
    try:
        value = ast.literal_eval(options) if isinstance(options, str) else options
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, (list, tuple)):
        raise EvalError("V602", f"question {item_id}: options must be a list, got {options!r:.80}.")
    return list(value)


def _text(question: str, options: dict[str, str], prompt: str) -> str:
    """The prompt. Source: MMMU's llava1.5 configuration; lmms_eval/tasks/mmmu."""
    if not options:
        return f"{question}\n\n{SHORT}" if prompt == "lmms-eval" else f"{question}\n{SHORT}"
    lines = option_lines(options, "{}. {}" if prompt == "lmms-eval" else "({}) {}")
    return f"{question}\n{lines}\n{LETTER}"


def _placed(text: str, row: Row, mode: str) -> tuple[str, tuple[Path | bytes, ...]]:
    """The prompt with a mark for each image, and the images.

    `first` takes image_1 and leaves the text as it is; `lmms-eval` does so with each image that is named, in the order
    of their numbers (mmmu_doc_to_visual).
    """
    text = literal(text)
    if mode == "first":
        first = _image(row.get("image_1"))
        return text, () if first is None else (first,)
    if mode == "lmms-eval":
        named = [_image(row.get(f"image_{number}")) for number in sorted(set(PLACE.findall(text)))]
        return text, tuple(image for image in named if image is not None)
    images: list[Path | bytes] = []

    def mark(place: re.Match[str]) -> str:
        image = _image(row.get(f"image_{place[1]}"))
        if image is None:
            return place[0]  # no mark without an image
        images.append(image)
        return "<image>"

    marked = PLACE.sub(mark, text)
    return marked, tuple(images)


def _image(value: Any) -> Path | bytes | None:
    """An image of a row: its bytes, or else its path."""
    if not isinstance(value, dict):
        return None
    if value.get("bytes"):
        return bytes(value["bytes"])
    return Path(value["path"]) if value.get("path") else None


def read_rows_of(data: str, split: str, images: bool) -> list[dict[str, Any]]:
    """Rows of a parquet file, or of all files of a split below a folder; without `images` their columns stay unread.

    Raises: ConfigError C102 if there is no such file, EvalError V602 for a damaged file or one without a column.
    """
    wanted = (*COLUMNS, *IMAGES) if images else COLUMNS
    return [row for file in parquet_files(data, split) for row in _rows(file, wanted)]


def parquet_files(data: str, split: str) -> list[Path]:
    """`data` itself, or DIR/**/SPLIT-*.parquet in order of name. Raises: ConfigError C102 if there is none."""
    path, name = Path(data), SPLITS.get(split, split)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError("C102", f"data={data}: no such file or folder.", "name a parquet file or a folder of such.")
    everything = sorted(path.rglob("*.parquet"))
    files = [file for file in everything if file.name.partition("-")[0].removesuffix(".parquet") == name]
    if not files:
        there = sorted({file.name.partition("-")[0] for file in everything})
        fix = f"choose split={'|'.join(there)}." if there else "name a parquet file, or a folder with such."
        raise ConfigError("C102", f"no {name}-*.parquet below data={data}.", fix)
    return files


def _rows(file: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as source:
            names = source.schema_arrow.names
            needed = COLUMNS if "image_1" not in wanted else (*COLUMNS, "image_1")
            missing = [name for name in needed if name not in names]
            if missing:
                raise EvalError("V602", f"{file} has no column {', '.join(missing)}.", "give MMMU's parquet files.")
            for batch in source.iter_batches(64, columns=[name for name in wanted if name in names]):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise EvalError(
            "V602", f"{file} cannot be read: {str(error).rstrip('.')}.", "give MMMU's parquet files."
        ) from error
