"""From data files to samples: every bad record found, and the accounting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_records import BAD, record, turns, write_folder

from vlmpeft import prepare
from vlmpeft.batch import IGNORE
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.errors import DataError
from vlmpeft.layouts import Segment
from vlmpeft.prepare import Prepared
from vlmpeft.record_encoder import Preparation
from vlmpeft.template import TurnEncoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture
def encoder(tokenizer: Any) -> TurnEncoder:
    return TurnEncoder(tokenizer, "chatml", 4)


def prepared(tmp_path: Path, records: list[Any], encoder: TurnEncoder, **options: Any) -> Prepared:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return again(tmp_path, encoder, **options)


def again(tmp_path: Path, encoder: TurnEncoder, **options: Any) -> Prepared:
    """Prepare the file that is there."""
    config = DataConfig(images=str(tmp_path / "images"), **options)
    file = DataFile(str(tmp_path / "train.json"))
    return prepare.prepare([file], Preparation(config, encoder), report=tmp_path / "bad.jsonl")


EXTRA = {  # what only shows when a record is encoded
    "lone surrogate in a question": ("D111", record("<image>\nab\ud800")),
    "lone surrogate in an answer": ("D111", record(answer="ab\udfff")),
    "longer than max_length": ("D109", record("<image>\n" + "ask " * 400)),
}


def good(count: int) -> list[Any]:
    kinds = [
        record(image="a.png"),
        record("<image> and <image>?", image=["a.png", "sub/d.png"]),
        record("What?", image=None),
        turns(("human", "a</s>"), ("gpt", "<image> 😀"), ("user", "c\r\n"), ("assistant", "7")),
        {**record(), "extra": {"kept": 1}},
    ]
    return [{**kinds[i % len(kinds)], "id": None if i % 10 == 4 else i} for i in range(count)]


def mixed() -> tuple[list[Any], dict[int, str]]:
    """100 good records with every kind of bad one between them. Returns: records, code of each bad index."""
    bad, records, codes = list((BAD | EXTRA).values()), [], {}
    for i, value in enumerate(good(100)):
        if i % 2 == 0 and i // 2 < len(bad):
            codes[len(records)], row = bad[i // 2]
            records.append({**row, "id": f"bad{i}"} if isinstance(row, dict) else row)
        records.append(value)
    assert len(codes) == len(bad)
    return records, codes


def test_every_bad_record_is_reported_and_no_good_one(folder: Path, tmp_path: Path, encoder: TurnEncoder) -> None:
    records, codes = mixed()
    with pytest.raises(DataError, match="D100") as caught:
        prepared(tmp_path, records, encoder, max_length=256)
    assert f"{len(codes)} of {len(records)} records are bad" in caught.value.message
    assert "data.on_bad_sample=skip" in caught.value.fix
    assert caught.value.line().isprintable()
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {row["record"]: row["code"] for row in rows} == codes
    assert all(f"record {row['record']} id=" in row["message"] for row in rows)


def test_skipping_leaves_every_record_either_used_or_skipped(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    records, codes = mixed()
    share = len(codes) / len(records)
    found = prepared(tmp_path, records, encoder, max_length=256, on_bad_sample="skip", max_bad_fraction=share)
    assert (len(found.samples), len(found.skipped), found.records) == (100, len(codes), len(records))
    assert all(s.labels.count(IGNORE) < len(s.labels) for s in found.samples)
    with pytest.raises(DataError, match=r"more than data\.max_bad_fraction=") as caught:
        prepared(tmp_path, records, encoder, max_length=256, on_bad_sample="skip", max_bad_fraction=share - 0.001)
    assert caught.value.code == "D100"


def test_clean_file_leaves_no_report_and_a_single_bad_record_is_the_error(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    assert prepared(tmp_path, good(20), encoder).skipped == []
    assert not (tmp_path / "bad.jsonl").exists()
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, [*good(3), record(answer="")], encoder)
    assert caught.value.code == "D110"
    assert 'record 3 id="x"' in caught.value.message


def test_too_long_records_may_be_left_out_and_are_counted(folder: Path, tmp_path: Path, encoder: TurnEncoder) -> None:
    records = [*good(5), EXTRA["longer than max_length"][1]]
    found = prepared(tmp_path, records, encoder, max_length=256, truncate="skip")
    assert (len(found.samples), [e.code for e in found.skipped]) == (5, ["D109"])
    assert json.loads((tmp_path / "bad.jsonl").read_text())["record"] == 5
    with pytest.raises(DataError, match=r"D112.*0 of 5 are bad, 5 longer") as caught:
        prepared(tmp_path, good(5), encoder, max_length=16, truncate="skip")
    assert caught.value.code == "D112"


def test_template_that_supervises_nothing_or_hides_an_image_is_refused(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    class Without:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def segments(self, exchanges: Any, system: Any) -> list[Segment]:
            rows = [Segment("image"), Segment("text", "q"), Segment("answer", "a")]
            return [s for s in rows if s.kind != self.kind]

    for kind, code in (("answer", "D110"), ("image", "D107")):
        encoder.template = Without(kind)
        with pytest.raises(DataError, match=code):
            prepared(tmp_path, [record()], encoder)


def test_fingerprint_changes_with_text_image_order_and_what_was_skipped(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    def key(*records: Any) -> str:
        options = {"on_bad_sample": "skip", "max_bad_fraction": 1.0}
        return prepared(tmp_path, list(records), encoder, **options).fingerprint

    one, two = {**record(), "id": 1}, {**record(answer="B"), "id": 2}
    others = [
        key(two, one),
        key(one, {**two, **turns(("human", "<image>\nWhat?"), ("gpt", "C")), "id": 2}),
        key(one, {**two, "image": "b.png"}),
        key(one, record(answer=""), two),
    ]
    assert key(one, two) == key(one, two)
    assert len({key(one, two), *others}) == 5


def test_records_of_one_id_name_each_other_unless_they_are_kept(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    rows = [record(), {**record(), "id": None}, record(answer="B"), {**record(), "id": None}]
    with pytest.raises(DataError, match=r'D102.*record 2 id="x": record 0 has the same id'):
        prepared(tmp_path, rows, encoder)
    assert len(again(tmp_path, encoder, duplicate_ids="keep").samples) == 4
    assert len(again(tmp_path, encoder, on_bad_sample="skip", max_bad_fraction=0.25).samples) == 3


def test_system_prompt_of_a_record_takes_the_place_of_the_encoders(
    folder: Path, tmp_path: Path, encoder: TurnEncoder, tokenizer: Any
) -> None:
    encoder.system = "Be kind."
    rows = [{**record(), "id": 1, "system": "Be brief."}, {**record(), "id": 2}]
    texts = [
        tokenizer.decode([i for i in sample.input_ids if i >= 0])
        for sample in prepared(tmp_path, rows, encoder).samples
    ]
    assert ["Be brief." in text for text in texts] == [True, False]
    assert ["Be kind." in text for text in texts] == [False, True]
    assert encoder.system == "Be kind."


def test_files_come_in_order_with_weights_and_folders_of_their_own(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    shutil.copytree(folder / "sub", tmp_path / "other")
    (tmp_path / "one.json").write_text(json.dumps([{**record(image="a.png"), "id": f"a{i}"} for i in range(3)]))
    (tmp_path / "two.json").write_text(json.dumps([{**record(image="d.png"), "id": f"b{i}"} for i in range(4)]))
    files = [DataFile(str(tmp_path / "one.json")), DataFile(str(tmp_path / "two.json"), 0.5, str(tmp_path / "other"))]
    how = Preparation(DataConfig(images=str(folder)), encoder)
    found = prepare.prepare(files, how)
    assert [s.uid for s in found.samples] == ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]
    assert found.samples[5].images == ((tmp_path / "other" / "d.png").resolve(),)
    assert found.samples.shares == [(3, 1.0), (4, 0.5)]
    alone = [prepare.prepare([file], how).fingerprint for file in files]
    assert len({found.fingerprint, *alone, prepare.prepare(files[::-1], how).fingerprint}) == 4
