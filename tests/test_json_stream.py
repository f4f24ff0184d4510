"""JSON records one at a time: what `json.loads` would give, whatever the size of the pieces a file is read in."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from vlmpeft import json_stream
from vlmpeft.errors import DataError
from vlmpeft.json_stream import json_records

ROWS = [{"id": 1, "t": "a b"}, {"id": 2, "t": "é\u2028\x85 line"}]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(ROWS).encode(),
        b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
        "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS).encode(),
        "\r\n\r\n".join(json.dumps(r) for r in ROWS).encode() + b"\r\n",
        b"\xef\xbb\xbf\n" + "\n".join(json.dumps(r) for r in ROWS).encode(),
    ],
    ids=["list", "list with mark", "lines", "lines with CRLF", "lines with mark"],
)
def test_lists_and_lines_are_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert list(json_records(tmp_path / "a.json")) == ROWS


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kinds: list[Any] = [
        None,
        True,
        False,
        rng.randint(-(10**12), 10**12),
        rng.uniform(-1e9, 1e-9),
        "",
        'a"\\\n\t/',
        "é😀",
    ]
    if depth < 3 and rng.random() < 0.5:
        inside = [value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
        return inside if rng.random() < 0.5 else {str(rng.random()): item for item in inside}
    return rng.choice(kinds)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_pieces_of_any_size_give_the_same_records(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    rng = random.Random(chunk)
    for indent, ascii_only in ((None, True), (2, False), (None, False)):
        rows = [value(rng) for _ in range(20)] + [12345, -1.5e300, "end"]
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        assert list(json_records(tmp_path / "a.json")) == rows


BAD = [
    (b"", "neither a JSON list nor JSON lines"),
    (b"hello", "neither"),
    (b'[{"a": 1},\n {"a" 2}]', "line 2 column 7: Expecting ':'"),
    (b'[{"a": 1}', "line 1 column 10"),
    (b'[{"a": 1} {"a": 2}]', "line 1 column 11: Expecting ',' delimiter"),
    (b'[{"a": 1}]\n\n [2]', "line 3 column 2: Extra data"),
    (b'[{"a": 1},\n]', "line 2 column 1: "),
    (b'[{"a": "b\n"}]', "line 1 column 10: Invalid control character"),
    (b'[{"a": "b}]', "line 1 column 8: Unterminated string"),
    (b'{"a": 1}\n{"a": \n2}', "line 2 column 7: Expecting value"),
    (b'{\n "a": 1}', "a JSON-lines file needs one whole record a line"),
    (b'[{"a": "NaN",\n "b": NaN}]', "line 2 column 7: NaN is not JSON"),
    (b'{"a": 1}\n{"b": -Infinity}', "line 2 column 7: -Infinity is not JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'[{"a": ' + b"1" * 5000 + b"}]", "line 1"),
    (b'{"a": ' + b"1" * 5000 + b"}", "line 1"),
    ('[{"a": "é"}]'.encode("latin-1"), "not UTF-8 (byte 8)"),
    ('{"a": 1}\n{"a": "é"}'.encode("latin-1"), "not UTF-8 (byte 16)"),
    (b'[{"a": "\xf0\x9f"}]', "not UTF-8 (byte 8)"),
    ("[1]".encode("utf-16"), "not UTF-8 (byte 0)"),
]


@pytest.mark.parametrize("chunk", [4, 1 << 20])
@pytest.mark.parametrize(("data", "says"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_file_that_is_not_json_is_refused_with_its_place(
    data: bytes, says: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(json_records(tmp_path / "a.json"))
    assert caught.value.code == "D101"
    assert says in caught.value.message
    assert str(tmp_path / "a.json") in caught.value.message


def test_memory_is_that_of_a_piece_and_not_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 1 << 14)
    (tmp_path / "a.json").write_text(json.dumps([{"text": f"{i} " + "x" * 500} for i in range(8000)]))
    tracemalloc.start()
    count = sum(1 for _ in json_records(tmp_path / "a.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert peak < 0.1 * (tmp_path / "a.json").stat().st_size
