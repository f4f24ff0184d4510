"""Files of every accepted format to records, read piece by piece: JSON, JSON lines, CSV, TSV, Parquet, Arrow."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import DataError
from vlmpeft.json_stream import json_records
from vlmpeft.normalise import fits, unknown_shape

ROWS = 256  # rows of a table turned into Python objects at once
ARROW_FILE, ARROW_STREAM, PARQUET = b"ARROW1", b"\xff\xff\xff\xff", b"PAR1"  # first bytes


def read_records(path: Path) -> Iterator[Any]:
    """Records of a file, or of a folder that `datasets` saved, in order.

    The format is told by a file's first bytes, CSV and TSV by the name.
    Raises: DataError D101 with the place, or with the columns of a table that hold no conversation.
    """
    if not path.exists():
        raise DataError("D101", f"no data file {path}.", "check data.pretrain and data.instruct.")
    empty = True
    for record in _reader(path):
        empty = False
        yield record
    if empty:
        raise DataError("D101", f"{path} holds no record.", "write a list of records.")


def _reader(path: Path) -> Iterator[Any]:
    if path.is_dir():
        return _saved_dataset(path)
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise DataError("D101", f"{path} is empty.", "write a list of records.")
    if head.startswith(PARQUET):
        return _table(path, _parquet(path), "Parquet")
    if head.startswith((ARROW_FILE, ARROW_STREAM)):
        return _table(path, _arrow(path, head), "Arrow")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _csv(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    return json_records(path)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if not fits(columns):
        raise DataError("D101", f"{path} has the columns {unknown_shape(columns)}", "rename the columns.")


def _csv(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    """Rows below a header; an empty cell is None."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            columns = [name.strip() for name in next(reader, [])]
            _check_columns(path, columns)
            if twice := next((name for name in columns if name and columns.count(name) > 1), None):
                raise DataError("D101", f"{path} has two columns '{twice}'.", "rename or remove one of them.")
            for row in reader:
                if row and len(row) != len(columns):
                    cells = f"{len(row)} cells, the header {len(columns)}"
                    raise DataError("D101", f"{path} line {reader.line_num} has {cells}.", "quote the cell.")
                if row:
                    yield {name: cell or None for name, cell in zip(columns, row, strict=True)}
        except csv.Error as error:
            raise DataError("D101", f"{path} line {reader.line_num}: {error}.", "mend the row.") from error
        except UnicodeDecodeError as error:
            raise DataError("D101", f"{path} is not UTF-8 (byte {error.start}).", "save it as UTF-8.") from error


def _table(path: Path, batches: Iterator[Any], kind: str) -> Iterator[dict[str, Any]]:
    """Rows of Arrow batches or tables. Raises: DataError D101 for a damaged file."""
    import pyarrow

    try:
        for batch in batches:
            _check_columns(path, batch.schema.names)
            yield from (row for start in range(0, len(batch), ROWS) for row in batch.slice(start, ROWS).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError("D101", f"{path} cannot be read as {kind}: {reason}", "write the file again.") from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        yield from file.iter_batches(ROWS)


def _arrow(path: Path, head: bytes) -> Iterator[Any]:
    import pyarrow.ipc

    source = pyarrow.memory_map(str(path))
    if head.startswith(ARROW_STREAM):
        yield from pyarrow.ipc.open_stream(source)
    else:
        file = pyarrow.ipc.open_file(source)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))


def _saved_dataset(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder written by `save_to_disk`. Raises: DataError D101 for another folder, or one of splits."""
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"the folder {path} was not written by datasets.save_to_disk."
        raise DataError("D101", message, "name a file, or such a folder.") from error
    if not isinstance(found, Dataset):
        splits = ", ".join(map(str, found))
        raise DataError(
            "D101", f"{path} holds the splits {splits}.", f"name one, for example {path}/{next(iter(found))}."
        )
    return _table(path, found.with_format("arrow").iter(ROWS), "Arrow")
