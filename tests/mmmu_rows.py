"""Rows and files of MMMU's layout for its tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from vlmpeft.eval import mmmu

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour: str) -> dict[str, Any]:
    """A picture as the datasets library stores it."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), COLOURS[colour]).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{colour}.png"}


def row(name: str, question: str = "What is it?", answer: str = "A", **changes: Any) -> dict[str, Any]:
    """A multiple-choice row of MMMU's columns."""
    images = {f"image_{n}": None for n in range(1, 8)}
    own = {"id": f"validation_{name}", "question": question, "options": "['cat', 'dog']", "answer": answer}
    return {**own, "explanation": "", **images, "question_type": "multiple-choice", "subfield": "x", **changes}


def open_row(name: str, answer: str, **changes: Any) -> dict[str, Any]:
    return row(name, answer=answer, options="[]", question_type="open", **changes)


ROWS = [
    row("Art_1", "Look: <image 1>", image_1=png("red")),
    row("Art_Theory_1", "No place named", "B", image_1=png("green")),
    row("Math_1", "Compare <image 2> with <image 1>, then <image 2>.", image_1=png("red"), image_2=png("blue")),
    open_row("Math_2", "['24/7', '3.429']", question="Ratio in <image 1>?", image_1=png("red")),
    row("Math_3", "Which?", options="['<image 1>', '<image 2>', 'x']", image_1=png("red"), image_2=png("green")),
    row("Clinical_Medicine_12", "<image 1> and <image 3> and a literal <image>", image_1=png("blue")),
]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {f"image_{n}": image for n in range(1, 8)}
    columns = {key: pa.array([r[key] for r in rows], types.get(key, pa.string())) for key in rows[0]}
    parquet.write_table(pa.table(columns), path)
    return path


def write_layout(folder: Path) -> Path:
    """The public layout: a folder a subject, a file a split."""
    for r in ROWS:
        subject = mmmu.subject_of(r["id"])
        mine = [x for x in ROWS if mmmu.subject_of(x["id"]) == subject]
        save(folder / subject / "validation-00000-of-00001.parquet", mine)
    save(folder / "Art" / "dev-00000-of-00001.parquet", [row("Art_9")])
    return folder


def items(data: Path, images: bool = True, **changes: str) -> dict[str, Any]:
    arguments = {"data": str(data), **mmmu.BENCHMARK.defaults, **changes}
    return {item.id.removeprefix("validation_"): item for item in mmmu.read_items(arguments, images)}
