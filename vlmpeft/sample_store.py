"""Encoded samples in an Arrow file: written once, memory-mapped after, decoded one at a time.

A sample is kept as the ids of its text and the runs it consists of: (tokens, kind, turn) with a kind of TEXT, ANSWER
(its ids are labels too) or IMAGE (no ids), which takes a tenth of ids, labels and turns written out.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmpeft.anyres import Tiling, tiling_of
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.errors import DataError

SAMPLES, IMAGES, FAULTS, FACTS = "samples.arrow", "images.arrow", "faults.jsonl", "facts.json"
TEXT, ANSWER, IMAGE = 0, 1, 2
ROWS = 1000  # samples of an Arrow batch
MISSING = -1  # size of a file that is not there


@dataclass(frozen=True)
class Sample:
    """One training sample: ids, labels and turns (see `Batch`), and its image files in order of appearance.

    tilings: of the images, see `Batch.tilings`; as many as images, or none.
    cut: tokens that did not fit into data.max_length.
    """

    uid: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    turns: Sequence[int]
    images: tuple[Path, ...]
    tilings: tuple[Tiling, ...] = ()
    cut: int = 0


class PackedSample(NamedTuple):
    """A sample as it is kept.

    Args: ids: of its text, (t,). runs: (r, 3), see above; both int32. length, cut: as tokens.
    """

    uid: str
    ids: Any
    runs: Any
    images: tuple[Path, ...]
    length: int
    tilings: tuple[Tiling, ...] = ()
    cut: int = 0


def packed(sample: Sample) -> PackedSample:
    """A sample in the form it is kept in."""
    ids, labels, turns = (np.asarray(row, np.int32) for row in (sample.input_ids, sample.labels, sample.turns))
    kinds = np.where(ids == IMAGE_TOKEN_ID, IMAGE, np.where(labels != IGNORE, ANSWER, TEXT)).astype(np.int32)
    changes = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(turns) != 0)) + 1
    starts = np.concatenate(([0], changes)).astype(np.int32)
    counts = np.diff(starts, append=len(ids))
    runs = np.stack((counts, kinds[starts], turns[starts]), axis=1).astype(np.int32)
    return PackedSample(sample.uid, ids[kinds != IMAGE], runs, sample.images, len(ids), sample.tilings, sample.cut)


def unpacked(text: Any, runs: Any) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """ids, labels and turns of what `packed` made."""
    counts, run_kinds, run_turns = runs.T
    kinds = np.repeat(run_kinds, counts)
    ids = np.full(len(kinds), IMAGE_TOKEN_ID, np.int32)
    ids[kinds != IMAGE] = text
    labels = np.where(kinds == ANSWER, ids, np.int32(IGNORE))
    rows = (ids, labels, np.repeat(run_turns, counts))
    return array("i", rows[0].tobytes()), array("i", rows[1].tobytes()), array("i", rows[2].tobytes())


class SampleWriter:
    """Writes samples into a folder, in order.

    Attributes: fingerprint: sha256 of what was added.
    """

    def __init__(self, directory: Path) -> None:
        import pyarrow

        self.pyarrow, self.directory = pyarrow, directory
        self.numbers = numbers = pyarrow.list_(pyarrow.int32())
        columns = {"uid": pyarrow.binary(), "ids": numbers, "runs": numbers, "images": numbers}
        counts = dict.fromkeys(("length", "supervised", "cut"), pyarrow.int32())
        self.schema = pyarrow.schema([*columns.items(), *counts.items()])
        self.rows: list[tuple[Any, ...]] = []
        self.images: dict[str, int] = {}
        self.tilings: dict[str, list[int]] = {}
        self.fingerprint = hashlib.sha256()
        self.file = pyarrow.ipc.new_stream(pyarrow.OSFile(str(directory / SAMPLES), "wb"), self.schema)

    def add(self, sample: PackedSample) -> None:
        """Append a sample."""
        ids, runs = sample.ids, sample.runs
        images = [self.images.setdefault(str(path), len(self.images)) for path in sample.images]
        names = [path.name for path in sample.images]
        self.fingerprint.update(repr((sample.uid, names, len(ids))).encode())
        self.fingerprint.update(ids.tobytes() + runs.tobytes())
        if sample.tilings:
            self.tilings |= {str(path): t.numbers() for path, t in zip(sample.images, sample.tilings, strict=True)}
            self.fingerprint.update(repr(sample.tilings).encode())
        supervised = int(runs[runs[:, 1] == ANSWER, 0].sum())
        self.rows.append((_bytes(sample.uid), ids, runs.ravel(), images, sample.length, supervised, sample.cut))
        if len(self.rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self.rows, strict=True)
        arrays = [self.pyarrow.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)]
        self.file.write_batch(self.pyarrow.record_batch(arrays, schema=self.schema))
        self.rows.clear()

    def close(self, refused: Iterable[Path], animated: Iterable[Path], faults: dict[int, DataError]) -> None:
        """Write what is left and what was found.

        Args:
            refused: files that no sample shows because of their state.
            animated: files of which only the first frame is shown.
            faults: why records are not among the samples, by index.
        """
        if self.rows:
            self._flush()
        self.file.close()
        paths = [*self.images, *(p for p in map(str, refused) if p not in self.images)]
        moving = {str(path) for path in animated}
        stamps = [stamp(path) for path in paths]
        table = self.pyarrow.table({
            "path": self.pyarrow.array(map(_bytes, paths), self.pyarrow.binary()),
            "size": self.pyarrow.array([size for size, _ in stamps], self.pyarrow.int64()),
            "changed": self.pyarrow.array([changed for _, changed in stamps], self.pyarrow.int64()),
            "animated": self.pyarrow.array([path in moving for path in paths], self.pyarrow.bool_()),
            "tiling": self.pyarrow.array([self.tilings.get(path, []) for path in paths], self.numbers),
        })  # fmt: skip
        with self.pyarrow.ipc.new_stream(str(self.directory / IMAGES), table.schema) as file:
            file.write_table(table, ROWS)
        lines = [{"record": i, "code": e.code, "message": e.message, "fix": e.fix} for i, e in faults.items()]
        (self.directory / FAULTS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self.fingerprint.update(str(sorted(faults)).encode())
        sizes = {name: (self.directory / name).stat().st_size for name in (SAMPLES, IMAGES, FAULTS)}
        facts = {"fingerprint": self.fingerprint.hexdigest()[:16], "sizes": sizes, "shown": len(self.images)}
        (self.directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def stamp(path: str) -> tuple[int, int]:
    """(size, time of change in ns) of a file; (MISSING, 0) if it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return MISSING, 0
    return found.st_size, found.st_mtime_ns


def _bytes(text: str) -> bytes:
    """Text as bytes, whatever it holds: ids and file names come from anywhere."""
    return text.encode("utf-8", "surrogatepass")


def _text(data: Any) -> str:
    return str(data.as_py(), "utf-8", "surrogatepass")


def _mapped(path: Path) -> Any:
    """The Arrow table of a file, memory-mapped."""
    import pyarrow.ipc

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def is_current(directory: Path, look: bool) -> bool:
    """Whether a folder holds samples, whole. Args: look: and whether every image is what it was then."""
    if not (directory / FACTS).is_file():
        return False
    sizes = json.loads((directory / FACTS).read_text(encoding="utf-8"))["sizes"]
    if any(stamp(str(directory / name))[0] != size for name, size in sizes.items()):
        return False
    for batch in _mapped(directory / IMAGES).to_batches() if look else ():
        then = zip(batch["size"].to_pylist(), batch["changed"].to_pylist(), strict=True)
        if any(stamp(_text(path)) != known for path, known in zip(batch["path"], then, strict=True)):
            return False
    return True


class SampleStore(Sequence[Sample]):
    """The samples of a folder. A copy for another process is its path.

    Attributes: lengths, supervised, pictures, cut: tokens, answer tokens, images and tokens cut off of each sample.
    """

    def __init__(self, directory: Path) -> None:
        import pyarrow.compute

        self.directory = directory
        table, self._images = _mapped(directory / SAMPLES), _mapped(directory / IMAGES)
        self._columns = [table[name] for name in ("uid", "ids", "runs", "images")]
        self.lengths, self.supervised, self.cut = (table[k].to_numpy() for k in ("length", "supervised", "cut"))
        self.pictures = pyarrow.compute.list_value_length(table["images"]).to_numpy()
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        self.fingerprint: str = facts["fingerprint"]
        self._shown: int = facts["shown"]

    def __reduce__(self) -> tuple[type[SampleStore], tuple[Path]]:
        return SampleStore, (self.directory,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        uid, ids, runs, images = (column[index] for column in self._columns)
        rows = unpacked(ids.values.to_numpy(), runs.values.to_numpy().reshape(-1, 3))
        shown = images.as_py()
        tilings = tuple(tiling_of(numbers) for i in shown if (numbers := self._images["tiling"][i].as_py()))
        return Sample(_text(uid), *rows, tuple(self._image(i) for i in shown), tilings, int(self.cut[index]))

    def _image(self, row: int) -> Path:
        return Path(_text(self._images["path"][row]))

    def images(self) -> Iterator[Path]:
        """Every image file of the samples, once."""
        return (self._image(row) for row in range(self._shown))

    @property
    def animated(self) -> int:
        """Image files of which only the first frame or page is shown."""
        return int(self._images["animated"].to_numpy().sum())

    def faults(self) -> dict[int, DataError]:
        """Why records are not among the samples, by index."""
        with (self.directory / FAULTS).open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return {row["record"]: DataError(row["code"], row["message"], row["fix"]) for row in rows}
