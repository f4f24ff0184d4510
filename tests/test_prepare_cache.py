"""Samples found in the cache: nothing is done twice, and nothing that changed is taken for the old."""

from __future__ import annotations

import ast
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from bad_records import BAD, record, write_folder
from PIL import Image
from test_prepare import again, good, prepared

from vlmpeft import fs, prepare, record_encoder, records
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.errors import DataError
from vlmpeft.prepare import CODE, Prepared
from vlmpeft.record_encoder import Preparation
from vlmpeft.template import TurnEncoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture
def encoder(tokenizer: Any) -> TurnEncoder:
    return TurnEncoder(tokenizer, "chatml", 4)


class Counting:
    """Counts what a second start must not do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, int] = {}
        self.patch = monkeypatch
        self.watch(record_encoder, "read_records")
        self.watch(TurnEncoder, "encode")
        self.watch(records, "check_header")

    def watch(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return real(*args, **options)

        self.patch.setattr(owner, name, counted)

    def taken(self) -> dict[str, int]:
        """Calls since the last time."""
        calls, self.calls = self.calls, {}
        return calls


def rows_of(found: Prepared) -> list[Any]:
    return [(s.uid, list(s.input_ids), list(s.labels), list(s.turns), s.images) for s in found.samples]


def test_second_start_reads_no_record_encodes_nothing_and_opens_no_image(
    folder: Path, tmp_path: Path, encoder: TurnEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    first = prepared(tmp_path, [*good(20), record(answer="")], encoder, on_bad_sample="skip", max_bad_fraction=1)
    assert counting.taken() == {"read_records": 1, "encode": 20, "check_header": 2}
    second = again(tmp_path, encoder, on_bad_sample="skip", max_bad_fraction=1)
    assert counting.taken() == {}
    assert rows_of(second) == rows_of(first)
    assert (second.fingerprint, second.records) == (first.fingerprint, 21)
    assert [e.line() for e in second.skipped] == [e.line() for e in first.skipped]
    with pytest.raises(DataError, match="D110"):  # the policy is no part of what was kept
        again(tmp_path, encoder)
    assert counting.taken() == {}


def test_whatever_decides_the_samples_makes_them_anew(
    folder: Path, tmp_path: Path, encoder: TurnEncoder, bos_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    prepared(tmp_path, good(5), encoder)
    prepared(tmp_path, good(6), encoder)
    assert counting.taken()["read_records"] == 2
    others = [
        TurnEncoder(encoder.tokenizer, "chatml", 5),
        TurnEncoder(encoder.tokenizer, "vicuna_v1", 4),
        TurnEncoder(encoder.tokenizer, "chatml", 4, system="Be brief."),
        TurnEncoder(bos_tokenizer, "chatml", 4),
    ]
    for i, other in enumerate(others, start=1):
        again(tmp_path, other)
        assert counting.taken()["read_records"] == 1, i
    for options in ({"max_length": 100}, {"truncate": "skip"}, {"verify_images": "full"}, {"duplicate_ids": "keep"}):
        again(tmp_path, encoder, **options)
        assert counting.taken()["read_records"] == 1, options
    again(tmp_path, copy.copy(encoder), held_out=0.5, workers=7)
    assert counting.taken() == {}


def test_changed_missing_and_new_images_are_looked_at_again(
    folder: Path, tmp_path: Path, encoder: TurnEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    options = {"on_bad_sample": "skip", "max_bad_fraction": 1.0}
    rows = [{**record(image=name), "id": name} for name in ("a.png", "b.png", "new.png")]
    assert len(prepared(tmp_path, rows, encoder, **options).samples) == 2
    Image.new("RGB", (8, 6)).save(folder / "new.png")
    assert len(again(tmp_path, encoder, **options).samples) == 3
    os.utime(folder / "a.png", ns=(1, 1))
    again(tmp_path, encoder, **options)
    (folder / "b.png").unlink()
    assert [e.code for e in again(tmp_path, encoder, **options).skipped] == ["D103"]
    assert counting.taken()["read_records"] == 4
    again(tmp_path, encoder, **options)
    assert counting.taken() == {}


def test_images_are_left_alone_when_asked(folder: Path, tmp_path: Path, encoder: TurnEncoder) -> None:
    rows = [{**record(image=name), "id": name} for name in ("page.jpg", "later.png")]
    for _ in range(2):
        assert len(prepared(tmp_path, rows, encoder, verify_images="none").samples) == 2
    with pytest.raises(DataError, match="D120"):
        prepared(tmp_path, [record(image="../secret.png")], encoder, verify_images="none")


@pytest.mark.parametrize("name", ["samples.arrow", "images.arrow", "facts.json"])
def test_damaged_cache_is_made_anew(name: str, folder: Path, tmp_path: Path, encoder: TurnEncoder) -> None:
    before = rows_of(prepared(tmp_path, good(7), encoder))
    directory = prepared(tmp_path, good(7), encoder).samples.stores[0].directory
    data = (directory / name).read_bytes()
    (directory / name).unlink()
    if name != "facts.json":
        (directory / name).write_bytes(data[:-9])
    assert rows_of(again(tmp_path, encoder)) == before
    assert (directory / name).read_bytes() == data


def test_killed_build_leaves_nothing_that_counts(
    folder: Path, tmp_path: Path, encoder: TurnEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("VLMPEFT_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(prepare.SampleWriter, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path, good(7), encoder)
    left = fs.cache_dir() / f"{fs.TEMPORARY}{next(fs.cache_dir().glob('data-*.lock')).stem}-0000aaaa"
    left.mkdir()  # as a kill leaves it
    assert len(again(tmp_path, encoder).samples) == 7
    assert not left.exists()
    assert len(list(fs.cache_dir().glob("data-*/facts.json"))) == 1


def test_key_covers_every_module_that_decides_samples() -> None:
    """Followed from the modules a record passes through; data sections and the writer of files are named otherwise."""
    here = Path(prepare.__file__).parent
    found, todo = set(), {"readers", "records", "data", "sample_store"}
    while todo:
        name = todo.pop()
        found.add(name)
        tree = ast.parse((here / f"{name}.py").read_text())
        modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names = {m.removeprefix("vlmpeft.") for m in modules}
        todo |= {n for n in names if (here / f"{n}.py").is_file()} - found - {"errors", "data_config", "sampling"}
    assert found <= {*CODE.split()}


def test_processes_write_the_bytes_that_one_writes(
    folder: Path, encoder: TurnEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good records and bad ones, ids given twice, animated and missing files, over many chunks and two workers."""
    rows: list[Any] = [{**record(image="a.png"), "id": i % 90} for i in range(60)]
    rows += [value for _, value in BAD.values()] + rows[:50]
    path = folder.parent / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(images=str(folder), on_bad_sample="skip", max_bad_fraction=1.0)
    how = Preparation(config, encoder)
    monkeypatch.setattr(record_encoder, "CHUNK", 7)
    written = []
    for processes in (0, 2):
        monkeypatch.setattr(record_encoder, "_processes", lambda _, n=processes: n)
        monkeypatch.setenv("VLMPEFT_CACHE", str(tmp_path / f"cache{processes}"))
        store = prepare.open_store(DataFile(str(path)), how)
        written.append({file.name: file.read_bytes() for file in sorted(store.directory.iterdir())})
    assert len(store) > 50
    assert len(store.faults()) > 10
    assert written[0] == written[1]


def test_a_file_that_breaks_off_is_named_by_processes_too(
    folder: Path, encoder: TurnEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.parent / "torn.jsonl"
    path.write_text("".join(json.dumps({**record(image="a.png"), "id": i}) + "\n" for i in range(30)) + '{"id": ')
    how = Preparation(DataConfig(images=str(folder)), encoder)
    monkeypatch.setattr(record_encoder, "CHUNK", 7)
    monkeypatch.setattr(record_encoder, "_processes", lambda _: 2)
    with pytest.raises(DataError, match=r"D101.*torn\.jsonl"):
        prepare.open_store(DataFile(str(path)), how)
