"""Records of a file checked and encoded, in order, by as many processes as there are cores where the file is large.

A worker process reads the whole file and encodes every n-th chunk of it, so that no record and no tokenizer travels
between processes: reading takes a tenth of the time of encoding.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmpeft.anyres import Tiling
from vlmpeft.data import Fault, encode_sample
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.errors import DataError
from vlmpeft.readers import read_records
from vlmpeft.records import RecordParser, identifier
from vlmpeft.sample_store import PackedSample, packed
from vlmpeft.template import TurnEncoder

CHUNK = 256  # records
LARGE = 32 << 20  # bytes of a file from which worker processes repay their start


def one_view(_: Path) -> Tiling:
    """How an image is shown that is one square."""
    return Tiling()


@dataclass(frozen=True)
class Preparation:
    """How records become samples.

    Args:
        independent: encode turns as independent (see `TurnEncoder.encode`).
        tiling: how an image file is shown.
        size: side of the squares the model sees, which decides `tiling` with the options of the data section.
        new_tokens: that the encoder was made with.
    """

    config: DataConfig
    encoder: TurnEncoder
    independent: bool = False
    tiling: Callable[[Path], Tiling] = one_view
    size: int = 0
    new_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What became of records that follow one another.

    Args:
        results: (id as given, sample or what is wrong) of each record.
        refused: files that records were refused for, since the chunk before of the same process.
        animated: likewise, files with several frames or pages.
        broken: why reading ended here, if the file cannot be read on.
    """

    results: list[tuple[str | None, PackedSample | Fault]]
    refused: set[Path]
    animated: set[Path]
    broken: Fault | None = None


class RecordChunks(IterableDataset[Chunk]):
    """The chunks of a file; in a worker of a `DataLoader` every n-th of them.

    Args: file: what to read. how: how records become samples.
    """

    def __init__(self, file: DataFile, how: Preparation) -> None:
        self.file, self.how = file, how

    def __iter__(self) -> Iterator[Chunk]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        path, config = Path(self.file.path), self.how.config
        folder = self.file.images or config.images
        images = Path(folder) if folder else None
        parse = RecordParser(path, images, config.auto_image_token, config.verify_images, config.max_image_pixels)
        refused: set[Path] = set()
        animated: set[Path] = set()
        records, start = read_records(path), 0
        for number in itertools.count():
            broken, part = None, list[Any]()
            try:
                part.extend(itertools.islice(records, CHUNK))
            except DataError as error:
                broken = Fault(error.code, error.message, error.fix)
            if broken is None and not part:
                return
            if number % every == first:
                results = [self._encoded(parse, start + i, record) for i, record in enumerate(part)]
                new_refused, new_animated = set(parse.refused_files()) - refused, parse.animated - animated
                yield Chunk(results, new_refused, new_animated, broken)
                refused |= new_refused
                animated |= new_animated
            if broken is not None:
                return
            start += len(part)

    def _encoded(self, parse: RecordParser, index: int, record: Any) -> tuple[str | None, PackedSample | Fault]:
        how = self.how
        try:
            sample = encode_sample(parse(index, record), how.config, how.encoder, how.independent, how.tiling)
        except DataError as error:
            return identifier(record), Fault(error.code, error.message, error.fix)
        return identifier(record), packed(sample)


def encoded(file: DataFile, how: Preparation) -> Iterator[Chunk]:
    """The chunks of a file in order. `data.workers=0` keeps everything in this process."""
    workers = _processes(file) if how.config.workers else 0
    loader: DataLoader = DataLoader(
        RecordChunks(file, how), batch_size=None, num_workers=workers, worker_init_fn=_alone if workers else None,
        collate_fn=_as_it_is,
    )  # fmt: skip
    yield from loader


def _as_it_is(chunk: Any) -> Any:
    """Instead of the loader's own conversion, which makes tensors of arrays."""
    return chunk


def _alone(_: int) -> None:
    """One thread for each worker's tokenizer; after a fork it has to be told."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _processes(file: DataFile) -> int:
    """Worker processes for a file: none for a small one, or where processes do not start by forking."""
    path = Path(file.path)
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    forks = multiprocessing.get_start_method() == "fork"
    return cores if forks and cores > 1 and sum(p.stat().st_size for p in files if p.exists()) >= LARGE else 0
