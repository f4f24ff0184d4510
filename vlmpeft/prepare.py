"""Data files to samples: every record checked and encoded once, kept in the cache, and found there the next time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmpeft import fs
from vlmpeft.data import Fault
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.errors import CheckpointError, DataError
from vlmpeft.mixture import Mixture
from vlmpeft.record_encoder import Preparation, encoded
from vlmpeft.sample_store import SampleStore, SampleWriter, is_current

SHOWN = 20  # bad records on the screen; all of them go to a file
HASHED = 1 << 30  # bytes of a file up to which its content tells whether it changed; above, what the system says of it
# What decides the samples of a file besides the file: modules, and keys of the data section.
CODE = (
    "anyres batch data images json_stream layout_names layout_tokenizer layouts normalise prepare readers "
    "record_encoder records safe_paths sample_store squares template"
)
OPTIONS = (
    "auto_image_token duplicate_ids image_mode max_image_pixels max_length tile_merge tiles truncate verify_images"
)


@dataclass(frozen=True)
class Prepared:
    """What became of the records of one or several files: each is used or skipped.

    Args: animated: image files with several frames or pages, of which the first is shown.
    """

    samples: Mixture
    skipped: list[DataError]
    fingerprint: str
    animated: int = 0

    @property
    def records(self) -> int:
        """used + skipped."""
        return len(self.samples) + len(self.skipped)


def prepare(files: Sequence[DataFile], how: Preparation, report: Path | None = None) -> Prepared:
    """Check and encode every record before anything trains on it, or find that it has been done.

    Args: report: where the list of bad and of too long records goes, one JSON object a line.

    Raises: DataError: D100 if records are bad and the policy is "error", or too many of them; D112 if none is left.
    """
    stores = [open_store(file, how) for file in files]
    faults = [store.faults() for store in stores]
    if report and any(faults):
        rows = [
            {"file": file.path, "record": index, "code": e.code, "message": e.message, "fix": e.fix}
            for file, found in zip(files, faults, strict=True)
            for index, e in found.items()
        ]
        fs.write_text(report, "".join(json.dumps(row) + "\n" for row in rows))
    for file, store, found in zip(files, stores, faults, strict=True):
        _judge(file.path, len(store), list(found.values()), how.config, report)
    weights = [file.weight for file in files]
    fingerprint = stores[0].fingerprint
    if len(files) > 1 or weights != [1.0]:
        pairs = [(store.fingerprint, weight) for store, weight in zip(stores, weights, strict=True)]
        fingerprint = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
    skipped = [error for found in faults for error in found.values()]
    return Prepared(Mixture(stores, weights), skipped, fingerprint, sum(store.animated for store in stores))


def _judge(path: str, used: int, left_out: list[DataError], config: DataConfig, report: Path | None) -> None:
    bad = [e for e in left_out if not (e.code == "D109" and config.truncate == "skip")]
    records = used + len(left_out)
    if bad and (config.on_bad_sample == "error" or len(bad) > config.max_bad_fraction * records):
        raise _refusal(path, bad, records, config, report)
    if not used:
        why = f"{len(bad)} of {records} are bad, {len(left_out) - len(bad)} longer than data.max_length"
        raise DataError(
            "D112", f"{path}: no record is left to train on ({why}).", "mend them or raise data.max_length."
        )


def _refusal(path: str, bad: list[DataError], records: int, config: DataConfig, report: Path | None) -> DataError:
    if len(bad) == 1 and config.on_bad_sample == "error":
        return bad[0]
    too_many, fix = "", "mend them or set data.on_bad_sample=skip."
    if config.on_bad_sample == "skip":
        too_many = f", more than data.max_bad_fraction={config.max_bad_fraction}"
        fix = "mend them or raise data.max_bad_fraction."
    listed = " | ".join(e.line() for e in bad[:SHOWN])
    where = f" All are listed in {report}." if report else ""
    return DataError("D100", f"{path}: {len(bad)} of {records} records are bad{too_many}: {listed}{where}", fix)


def open_store(file: DataFile, how: Preparation) -> SampleStore:
    """The samples of a file, whatever became of its bad records. One process builds, others wait for it.

    Raises: DataError D101 for a file that cannot be read; CheckpointError for a cache that cannot be written.
    """
    look = how.config.verify_images != "none"
    directory = fs.cache_dir() / f"data-{_key(file, how)}"
    if not is_current(directory, look):
        try:
            with _building(directory):
                if not is_current(directory, look):
                    with fs.new_directory(directory) as temporary:
                        _build(file, how, temporary)
        except CheckpointError as error:
            raise CheckpointError(error.code, error.message, "set VLMPEFT_CACHE to a folder with room.") from error
    return SampleStore(directory)


def _build(file: DataFile, how: Preparation, directory: Path) -> None:
    writer, faults, first = SampleWriter(directory), dict[int, DataError](), dict[str, int]()
    refused: dict[Path, None] = {}
    animated: set[Path] = set()
    index, path = 0, Path(file.path)
    with tqdm(desc=f"check {path.name}", unit="record", leave=False) as bar:
        for chunk in encoded(file, how):
            for uid, found in chunk.results:
                if uid is not None and first.setdefault(uid, index) != index and how.config.duplicate_ids == "error":
                    message = f'{path} record {index} id="{uid}": record {first[uid]} has the same id.'
                    faults[index] = DataError("D102", message, "give each its own, or set data.duplicate_ids=keep.")
                elif isinstance(found, Fault):
                    faults[index] = found.error()
                else:
                    writer.add(found)
                index += 1
            if chunk.broken is not None:
                raise chunk.broken.error()
            refused.update(dict.fromkeys(sorted(chunk.refused)))
            animated |= chunk.animated
            bar.update(len(chunk.results))
    writer.close(refused, animated, faults)


def _key(file: DataFile, how: Preparation) -> str:
    """Everything that decides the samples of a file, but for the state of its images."""
    config, encoder = how.config, how.encoder
    folder = file.images or config.images
    digest = hashlib.sha256()
    for part in (
        file.path,
        folder and os.path.realpath(folder),
        [getattr(config, name) for name in OPTIONS.split()],
        _tokenizer(encoder.tokenizer),
        (encoder.template, encoder.image_tokens, encoder.view_grid, encoder.system),
        (how.independent, how.size, how.new_tokens),
        [metadata.version(name) for name in ("tokenizers", "transformers")],
    ):
        digest.update(repr(part).encode())
    for name in CODE.split():
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    source = Path(file.path)
    for path in sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]:
        digest.update(_content(path).encode())
    return digest.hexdigest()[:16]


def _tokenizer(tokenizer: Any) -> Any:
    """What a tokenizer does, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
    vocabulary = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    return type(tokenizer).__name__, vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template


def _content(path: Path) -> str:
    """What identifies a file's content. Raises: DataError D101 if there is no file."""
    if not path.is_file():
        raise DataError("D101", f"no data file {path}.", "check data.pretrain and data.instruct.")
    stat = path.stat()
    if stat.st_size <= HASHED:
        try:
            return fs.sha256(path)
        except OSError as error:
            raise DataError("D101", f"{path} cannot be read: {error.strerror}.", "check its permissions.") from error
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


@contextlib.contextmanager
def _building(directory: Path) -> Iterator[None]:
    """Hold the right to build `directory`, which ends with the process. What a killed builder left is removed."""
    with fs.explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = directory.with_suffix(".lock").open("w")
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: everyone builds, the last rename stays
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in directory.parent.glob(f"{fs.TEMPORARY}{directory.name}-*"):
                fs.remove(left)
        yield
