"""LLaVA files to conversations: what is read, and that every bad record is found and named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from bad_records import BAD, record, turns, write_folder
from PIL import Image

from vlmpeft.errors import DataError
from vlmpeft.records import RecordParser
from vlmpeft.safe_paths import ImageFolder
from vlmpeft.template import IMAGE, ImageSlot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def code(parse: RecordParser, value: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(7, value)
    assert caught.value.message.startswith(f"{parse.path} record 7 id=")
    return caught.value.code


@pytest.mark.parametrize("kind", BAD)
def test_bad_record_is_refused_with_its_code_and_place(kind: str, folder: Path) -> None:
    expected, value = BAD[kind]
    assert code(RecordParser(Path("t.json"), folder), value) == expected


def test_nothing_outside_the_folder_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = RecordParser(Path("t.json"), folder)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    inside = str(folder.resolve() / "a.png")
    for name in (
        "../secret.png",
        "sub/../../secret.png",
        "..\\secret.png",
        "link.png",
        "file:///etc/passwd",
        "//host/x",
        inside,
    ):
        assert code(parse, record(image=name)) == "D120"


def test_missing_image_is_told_with_the_nearest_name(folder: Path) -> None:
    parse = RecordParser(Path("t.json"), folder)
    for name, close in (("A.PNG", "a.png"), ("sub/dd.png", "sub/d.png"), ("val/b.png", "b.png")):
        with pytest.raises(DataError, match=f"did you mean '{close}'"):
            parse(0, record(image=name))
    with pytest.raises(DataError, match=r"set data\.images"):
        RecordParser(Path("t.json"), None)(0, record())


def test_a_wrong_folder_is_listed_once_and_compared_a_few_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import difflib

    listed, compared = [], []
    real_list, real_match = os.listdir, difflib.get_close_matches
    monkeypatch.setattr(os, "listdir", lambda p: listed.append(p) or real_list(p))
    monkeypatch.setattr(difflib, "get_close_matches", lambda *a, **k: compared.append(a) or real_match(*a, **k))
    images = ImageFolder(folder)
    for i in range(300):
        with pytest.raises(DataError, match="D103"):
            images.find(f"missing{i}.jpg")
    assert (len(listed), len(compared)) == (1, 20)


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("marks", range(4))
@pytest.mark.parametrize("images", range(4))
def test_marks_and_images_must_agree(images: int, marks: int, auto: bool, folder: Path) -> None:
    parse = RecordParser(Path("t.json"), folder, auto_image_token=auto)
    names = ["a.png", "b.png", "c.png"][:images]
    value = record("<image>" * marks + "What?", image=names)
    if marks == images or (auto and marks == 0):
        found = parse(0, value)
        slots = [c for e in found.exchanges for c in e.question if isinstance(c, ImageSlot)]
        assert len(slots) == images
        assert found.images == tuple((folder / n).resolve() for n in names)
    else:
        assert code(parse, value) == ("D108" if images == 0 else "D107")


def test_missing_marks_are_put_first_when_asked_for(folder: Path) -> None:
    parse = RecordParser(Path("t.json"), folder, auto_image_token=True)
    assert parse(0, record("What?")).exchanges[0].question == parse(0, record("<image>\nWhat?")).exchanges[0].question
    assert parse(0, record("What?", image=["a.png", "b.png"])).exchanges[0].question == (IMAGE, IMAGE, "\nWhat?")


def test_marks_in_answers_and_escaped_marks_are_text(folder: Path) -> None:
    found = RecordParser(Path("t.json"), folder)(0, record(r"<image> Is \<image> a tag?", "Yes: <image> and \\<image>"))
    assert found.exchanges[0].question == (IMAGE, "\nIs <image> a tag?")
    assert found.exchanges[0].answer == "Yes: <image> and \\<image>"
    assert len(found.images) == 1


def test_images_come_in_the_order_of_their_marks_across_turns(folder: Path) -> None:
    value = turns(
        ("human", "<image> a?"), ("gpt", "x"), ("user", "b?"), ("assistant", "y"), ("human", "<image> c?"), ("gpt", "z")
    )
    found = RecordParser(Path("t.json"), folder)(0, {**value, "image": ["b.png", "sub/d.png"]})
    assert found.images == tuple((folder / n).resolve() for n in ("b.png", "sub/d.png"))
    assert [e.answer for e in found.exchanges] == ["x", "y", "z"]


def test_full_verification_decodes_and_header_verification_does_not(folder: Path) -> None:
    Image.effect_noise((64, 64), 50).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:2000])
    RecordParser(Path("t.json"), folder)(0, record(image="half.png"))
    assert code(RecordParser(Path("t.json"), folder, verify="full"), record(image="half.png")) == "D104"
