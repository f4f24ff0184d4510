"""Every accepted format and shape gives the same conversations; what is not accepted gets its line."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from bad_records import write_folder
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature

from vlmpeft import fs
from vlmpeft.errors import DataError
from vlmpeft.readers import read_records
from vlmpeft.records import Conversation, RecordParser

QUESTIONS = ["What is\nshown?", 'A "quoted", cell', "Why?"]
ANSWERS = ["A red square.", "Yes", "Because\tso."]
IMAGES = ["a.png", "sub/d.png", None]
ROWS = list(zip(IMAGES, QUESTIONS, ANSWERS, strict=True))


def table(question: str = "question", answer: str = "answer", **more: Any) -> list[dict[str, Any]]:
    return [{"image": image, question: q, answer: a, **more} for image, q, a in ROWS]


def llava() -> list[dict[str, Any]]:
    marked = [f"<image>\n{q}" if image else q for image, q, _ in ROWS]
    return [
        {"image": row[0], "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": row[2]}]}
        for row, q in zip(ROWS, marked, strict=True)
    ]


def messages() -> list[dict[str, Any]]:
    out = []
    for record in llava():
        asked, replied = (turn["value"] for turn in record["conversations"])
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
        out.append({"images": [record["image"]] if record["image"] else [], "messages": turns})
    return out


def parts(key: str) -> list[dict[str, Any]]:
    """OpenAI-style content. Args: key: of the image part; "" leaves the names beside the messages."""
    out = []
    for image, q, a in ROWS:
        source = {"image_url": {"image_url": {"url": image}}, "": {}}.get(key, {key: image})
        content = [{"type": "image_url" if key == "image_url" else "image", **source}] if image else []
        turns = [
            {"role": "user", "content": [*content, {"type": "text", "text": q}]},
            {"role": "assistant", "content": [{"type": "text", "text": a}]},
        ]
        out.append({"messages": turns, **({} if key else {"images": [image] if image else []})})
    return out


def as_json(rows: list[Any], path: Path) -> None:
    path.with_suffix(".json").write_text(json.dumps(rows))


def as_lines(rows: list[Any], path: Path) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_csv(rows: list[Any], path: Path, delimiter: str = ",") -> None:
    with path.with_suffix(".csv" if delimiter == "," else ".tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        writer.writerows(cells)


def as_tsv(rows: list[Any], path: Path) -> None:
    as_csv(rows, path, "\t")


def as_parquet(rows: list[Any], path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))


def as_arrow(rows: list[Any], path: Path) -> None:
    whole = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(str(path.with_suffix(".arrow")), whole.schema) as file:
        file.write_table(whole, 2)


def as_stream(rows: list[Any], path: Path) -> None:
    whole = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(path.with_suffix(".arrow")), whole.schema) as file:
        file.write_table(whole, 2)


def as_saved(rows: list[Any], path: Path) -> None:
    Dataset.from_list(rows).save_to_disk(path.with_suffix(".saved"))


PLAIN = [as_json, as_lines, as_csv, as_tsv, as_parquet, as_arrow, as_stream, as_saved]
SHAPES = {
    "llava": llava(),
    "messages": messages(),
    "question": table(),
    "prompt": table("prompt", "response"),
    "instruction": table("instruction", "output", input=""),
    "parts, url": parts("image_url"),
    "parts, image": parts("image"),
    "parts, beside": parts(""),
}


def conversations(path: Path, images: Path) -> list[Conversation]:
    [file] = path.parent.glob(f"{path.name}.*")
    parse = RecordParser(file, images)
    return [parse(i, record) for i, record in enumerate(read_records(file))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("write", PLAIN)
def test_every_format_and_shape_gives_the_same_conversations(
    write: Any, shape: str, folder: Path, tmp_path: Path
) -> None:
    as_json(llava(), tmp_path / "expected")
    write(SHAPES[shape], tmp_path / "data")
    for found, expected in zip(
        conversations(tmp_path / "data", folder), conversations(tmp_path / "expected", folder), strict=True
    ):
        assert (found.exchanges, found.images, found.system) == (expected.exchanges, expected.images, None)


@pytest.mark.parametrize("write", [as_parquet, as_saved])
def test_embedded_images_are_kept_as_files_with_the_same_bytes(write: Any, folder: Path, tmp_path: Path) -> None:
    data = (folder / "a.png").read_bytes()
    rows = [
        {"image": {"bytes": b, "path": p}, "question": "q", "answer": "a"} for b, p in ((data, None), (None, "b.png"))
    ]
    if write is as_saved:
        features = Features(
            {"image": ImageFeature(decode=True), "question": Value("string"), "answer": Value("string")}
        )
        Dataset.from_list(rows[:1], features=features).save_to_disk(tmp_path / "data.saved")
    else:
        write(rows, tmp_path / "data")
    found = conversations(tmp_path / "data", folder)
    assert found[0].images[0].read_bytes() == data
    assert found[0].images[0].name == hashlib.sha256(data).hexdigest()
    assert found[0].images[0].is_relative_to(fs.cache_dir())
    assert [c.images for c in found[1:]] == [((folder / "b.png").resolve(),)] * (write is as_parquet)


def one(folder: Path, record: dict[str, Any]) -> Conversation:
    return RecordParser(Path("t.json"), folder)(0, record)


def test_base64_images_are_kept_and_web_addresses_are_refused(folder: Path) -> None:
    def asked(url: str) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "q"}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}

    data = (folder / "a.png").read_bytes()
    encoded = base64.b64encode(data).decode()
    assert one(folder, asked(f"data:image/png;base64,{encoded}")).images[0].read_bytes() == data
    for url, code in (("data:image/png;base64,@@", "D102"), ("http://169.254.169.254/a.png", "D120")):
        with pytest.raises(DataError) as caught:
            one(folder, asked(url))
        assert caught.value.code == code
    with pytest.raises(DataError, match="D104"):
        one(folder, asked("data:image/png;base64," + base64.b64encode(b"<html>").decode()))


def test_system_messages_are_the_records_prompt(folder: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sharegpt = [{"from": "system", "value": "S"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for record in (
        {"messages": [{"role": "system", "content": "S"}, *chat]},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "S"}]}, *chat]},
        {"conversations": sharegpt},
        {"system": "S", "instruction": "q", "output": "a"},
    ):
        found = one(folder, record)
        assert (found.system, found.exchanges) == ("S", one(folder, {"messages": chat}).exchanges)
    with pytest.raises(DataError, match=r"D102.*turn 2 is from 'system'"):
        one(folder, {"messages": [*chat, {"role": "system", "content": "S"}, {"role": "assistant", "content": "a"}]})


def test_marks_typed_in_parts_are_text_and_input_follows_the_instruction(folder: Path) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": r"Is <image> or \<image> a tag?"}]
    answer = [{"type": "text", "text": "<image>"}]
    found = one(folder, {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    assert found.exchanges[0].question[1] == "\nIs <image> or <image> a tag?"
    assert (found.exchanges[0].answer, len(found.images)) == ("<image>", 1)
    alpaca = one(folder, {"instruction": "Sum up.", "input": "A text.", "output": "T."})
    assert alpaca.exchanges[0].question == ("Sum up.\nA text.",)
    marked = one(folder, {"question": "Is <image> red?", "answer": "No", "image": "a.png"})
    assert len(marked.images) == 1


SAID = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 0 is from 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 must hold"),
        ({"messages": "hello"}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type text or image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "image": "b.png"},
            "some images are in the messages",
        ),
        ({"question": 3, "answer": "x"}, "'question' must be text, got 3"),
        ({"question": "q", "answer": "a", "image_path": "a.png"}, "'image_path' looks like an image"),
        ({"question": "q", "answer": "a", "image": None, "Image": "a.png"}, "'Image' looks like an image"),
        ({"instruction": "q", "output": "a", "file_name": "a.png"}, "'file_name' looks like an image"),
        ({"messages": SAID, "img": "a.png"}, "'img' looks like an image"),
        ({"messages": SAID, "question": "q", "answer": "a"}, "'messages' and 'question, answer' are given"),
        ({"conversations": [{}], "messages": SAID}, "'conversations' and 'messages' are given"),
        ({"instruction": "q", "output": "a", "prompt": "q", "response": None}, "'instruction, output' and 'prompt, re"),
        ({"system": 3, "question": "q", "answer": "x"}, "system prompt must be text"),
        ({"texts": []}, "texts: no conversation among them; accepted: conversations"),
        ({"question": "q", "answer": "a", "image": {"path": "a.png"}}, "'image' must be"),
    ],
    ids=str,
)
def test_records_that_cannot_be_normalised_are_refused(record: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        one(folder, record)
    assert caught.value.code == "D102"
    assert says in caught.value.message


@pytest.mark.parametrize(
    "more",
    [
        {"conversations": None, "messages": [], "prompt": "", "response": ""},  # as a table of several shapes has
        {"image_path": None, "images": None, "image_size": [8, 6], "image_id": 3, "img": "", "filename_of_text": "x"},
    ],
    ids=str,
)
def test_keys_that_hold_nothing_or_are_no_image_do_no_harm(more: dict[str, Any], folder: Path) -> None:
    plain = {"id": "x", "question": "Why?", "answer": "So."}
    assert one(folder, plain | more) == one(folder, plain)
    assert len(one(folder, plain | more | {"images": ["a.png"], "file_name": "elsewhere.png"}).images) == 1


def test_names_of_columns_are_taken_without_the_space_around_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question , answer, image\nWhy?, So.,a.png\n")
    assert list(read_records(tmp_path / "a.csv")) == [{"question": "Why?", "answer": " So.", "image": "a.png"}]


@pytest.mark.parametrize("write", [as_csv, as_tsv, as_parquet, as_arrow, as_stream, as_saved])
def test_unknown_columns_are_named_with_what_is_accepted(write: Any, tmp_path: Path) -> None:
    write([{"picture": "a.png", "caption": "A square."}], tmp_path / "data")
    [file] = tmp_path.glob("data.*")
    with pytest.raises(DataError) as caught:
        list(read_records(file))
    assert caught.value.code == "D101"
    assert f"{file} has the columns picture, caption: no conversation" in caught.value.message
    assert "question, answer" in caught.value.message


def test_files_that_cannot_be_read_get_their_line(tmp_path: Path) -> None:
    as_parquet(table(), tmp_path / "cut")
    whole = (tmp_path / "cut.parquet").read_bytes()
    DatasetDict({"train": Dataset.from_list(table())}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    files: dict[str, tuple[bytes, str]] = {
        "cut.parquet": (whole[: len(whole) // 2], "cannot be read as Parquet"),
        "cut.arrow": (b"ARROW1\0\0abc", "cannot be read as Arrow"),
        "short.csv": (b"question,answer\na\n", "line 2 has 1 cells, the header 2"),
        "quote.csv": (b'question,answer\n"a"b,c\n', "line 2"),
        "latin.csv": ("question,answer\né,b\n".encode("latin-1"), "not UTF-8"),
        "empty.csv": (b"question,answer\n", "holds no record"),
        "twice.csv": (b"question,answer,question\na,b,c\n", "two columns 'question'"),
        "nothing.csv": (b"", "nothing.csv is empty"),
        "nothing.json": (b"", "nothing.json is empty"),
        "empty.json": (b"[]", "holds no record"),
    }
    for name, (data, says) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="D101") as caught:
            list(read_records(tmp_path / name))
        assert says in caught.value.message, name
    for name, says in (("none.json", "no data file"), ("folder", "save_to_disk"), ("splits", "the splits train")):
        with pytest.raises(DataError, match="D101") as caught:
            list(read_records(tmp_path / name))
        assert says in caught.value.message
