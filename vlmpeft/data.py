"""Conversations -> samples -> batches: every record checked and encoded before training, images read when needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlmpeft import fs
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, Batch, collate
from vlmpeft.errors import DataError
from vlmpeft.recipe import DataConfig
from vlmpeft.records import Conversation, RecordParser, read_records
from vlmpeft.sampling import epoch_batches, micro_batches
from vlmpeft.template import Encoding, TurnEncoder

__all__ = ["Loaded", "Prepared", "Sample", "Samples", "epoch_batches", "load_batches", "micro_batches", "prepare"]
__all__ += ["split_held_out", "supervised_share", "truncated"]

FILLER = -1  # index of a sample without loss, for a process whose share of a step is empty
SHOWN = 20  # bad records on the screen; all of them go to a file


@dataclass(frozen=True)
class Sample:
    """One training sample: ids, labels and turns (see `Batch`), and its image files in order of appearance."""

    uid: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    turns: Sequence[int]
    images: tuple[Path, ...]


def truncated(
    encoding: Encoding, images: Sequence[Path], max_length: int, image_tokens: int, policy: str
) -> tuple[Encoding, tuple[Path, ...]]:
    """Bring a conversation to at most `max_length` tokens without cutting an image or losing every answer token.

    Raises: DataError D109 if the policy is not "right" or nothing supervised would be left.
    """
    length = len(encoding.input_ids)
    if length <= max_length:
        return encoding, tuple(images)
    end = max_length - encoding.input_ids[:max_length].count(IMAGE_TOKEN_ID) % image_tokens  # back to the image's start
    cut = Encoding(encoding.input_ids[:end], encoding.labels[:end], encoding.turns[:end])
    if policy != "right" or cut.num_supervised == 0:
        needs = f"needs {length} tokens, data.max_length is {max_length}, images take {image_tokens * len(images)}."
        raise DataError("D109", needs, "raise data.max_length, or set data.truncate=skip.")
    return cut, tuple(images[: cut.input_ids.count(IMAGE_TOKEN_ID) // image_tokens])


@dataclass(frozen=True)
class Prepared:
    """What preflight made of a file: every record is in exactly one of the two lists."""

    samples: list[Sample]
    skipped: list[DataError]
    fingerprint: str

    @property
    def records(self) -> int:
        """used + skipped."""
        return len(self.samples) + len(self.skipped)


def prepare(
    path: Path, config: DataConfig, encoder: TurnEncoder, independent: bool, report: Path | None = None
) -> Prepared:
    """Check and encode every record of a file before anything trains on it.

    Args:
        independent: encode turns as independent (see `TurnEncoder.encode`).
        report: where the list of bad and of too long records goes, one JSON object a line.

    Raises: DataError: D100 if records are bad and the policy is "error", or too many of them; D112 if none is left.
    """
    folder = Path(config.images) if config.images else None
    parse = RecordParser(path, folder, config.auto_image_token, config.verify_images)
    samples: list[Sample] = []
    left_out: dict[int, DataError] = {}
    for index, record in enumerate(tqdm(read_records(path), desc=f"check {path.name}", unit="record", leave=False)):
        try:
            samples.append(_sample(parse(index, record), config, encoder, independent))
        except DataError as error:
            left_out[index] = error
    if report and left_out:
        rows = [{"record": i, "code": e.code, "message": e.message, "fix": e.fix} for i, e in left_out.items()]
        fs.write_text(report, "".join(json.dumps(row) + "\n" for row in rows))
    bad = [e for e in left_out.values() if not (e.code == "D109" and config.truncate == "skip")]
    records = len(samples) + len(left_out)
    if bad and (config.on_bad_sample == "error" or len(bad) > config.max_bad_fraction * records):
        raise _refusal(path, bad, records, config, report)
    if not samples:
        why = f"{len(bad)} of {records} are bad, {len(left_out) - len(bad)} longer than data.max_length"
        raise DataError(
            "D112", f"{path}: no record is left to train on ({why}).", "mend them or raise data.max_length."
        )
    return Prepared(samples, list(left_out.values()), _fingerprint(samples, left_out))


def _fingerprint(samples: Sequence[Sample], left_out: Iterable[int]) -> str:
    digest = hashlib.sha256(str(sorted(left_out)).encode())
    for sample in samples:
        names = [path.name for path in sample.images]
        digest.update(repr((sample.uid, names, len(sample.input_ids))).encode())
        digest.update(array("i", sample.input_ids).tobytes() + array("i", sample.labels).tobytes())
    return digest.hexdigest()[:16]


def _refusal(path: Path, bad: list[DataError], records: int, config: DataConfig, report: Path | None) -> DataError:
    if len(bad) == 1 and config.on_bad_sample == "error":
        return bad[0]
    too_many, fix = "", "mend them or set data.on_bad_sample=skip."
    if config.on_bad_sample == "skip":
        too_many = f", more than data.max_bad_fraction={config.max_bad_fraction}"
        fix = "mend them or raise data.max_bad_fraction."
    listed = " | ".join(e.line() for e in bad[:SHOWN])
    where = f" All are listed in {report}." if report else ""
    return DataError("D100", f"{path}: {len(bad)} of {records} records are bad{too_many}: {listed}{where}", fix)


def _sample(conversation: Conversation, config: DataConfig, encoder: TurnEncoder, independent: bool) -> Sample:
    try:
        encoding = encoder.encode(conversation.exchanges, independent)
        encoding, images = truncated(
            encoding, conversation.images, config.max_length, encoder.image_tokens, config.truncate
        )
        if encoding.num_supervised == 0:
            message = "no token carries a loss: the template supervises nothing here."
            raise DataError("D110", message, "check the answers and the template.")
        placeholders = encoding.input_ids.count(IMAGE_TOKEN_ID)
        if placeholders != encoder.image_tokens * len(images):
            message = f"{len(images)} images but room for {placeholders} image tokens."
            raise DataError("D107", message, "choose a template that shows every image.")
    except DataError as error:
        raise DataError(error.code, f"{conversation.where}: {error.message}", error.fix) from error
    ids, labels, turns = (array("i", row) for row in (encoding.input_ids, encoding.labels, encoding.turns))
    return Sample(conversation.uid, ids, labels, turns, images)


@dataclass(frozen=True)
class Fault:
    """A DataError as a value: worker processes cannot hand over the error itself."""

    code: str
    message: str
    fix: str


class Samples(Dataset[tuple[Sample, list[Tensor]] | Fault]):
    """Samples with their images, read lazily. Args: load: file -> (3, h, w) pixels or (n, d) features."""

    def __init__(self, samples: Sequence[Sample], load: Callable[[Path], Tensor]) -> None:
        self.samples, self.load = samples, load

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, list[Tensor]] | Fault:
        sample = self._filler() if index == FILLER else self.samples[index]
        try:
            return sample, [self.load(path) for path in sample.images]
        except DataError as error:
            return Fault(error.code, f'sample "{sample.uid}": {error.message}', error.fix)

    def _filler(self) -> Sample:
        """A sample without loss, with an image if any has one: the graph is that of the other processes."""
        sample = next((s for s in self.samples if s.images), self.samples[0])
        return dataclasses.replace(sample, uid="", labels=[IGNORE] * len(sample.labels))


@dataclass(frozen=True)
class Loaded:
    """A batch and the ids of its samples, none for a batch without loss that keeps a process in step."""

    batch: Batch
    uids: tuple[str, ...]

    def pin_memory(self) -> Loaded:
        """Called by the DataLoader's pinning thread."""
        return Loaded(self.batch.pin_memory(), self.uids)


def _collate(items: Sequence[tuple[Sample, list[Tensor]] | Fault]) -> Loaded | Fault:
    for item in items:
        if isinstance(item, Fault):
            return item
    pairs = [item for item in items if not isinstance(item, Fault)]
    images = [image for _, images in pairs for image in images]
    return Loaded(collate([sample for sample, _ in pairs], images), tuple(s.uid for s, _ in pairs if s.uid))


def load_batches(
    dataset: Samples, indices: Sequence[Sequence[int]], workers: int, pin: bool = False
) -> Iterator[Loaded]:
    """Batches for the given index lists, in order; an empty list gives a batch without loss.

    Raises: DataError for a file that went bad since preflight.
    """
    chosen = [list(batch) or [FILLER] for batch in indices]
    generator = torch.Generator()  # the loader would draw from the global one
    loader: DataLoader = DataLoader(
        dataset, batch_sampler=chosen, num_workers=workers, collate_fn=_collate, pin_memory=pin, generator=generator
    )
    for item in loader:
        if isinstance(item, Fault):
            raise DataError(item.code, item.message, item.fix)
        yield item


def split_held_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples, chosen by seed. At least one stays on each side when a share is asked for."""
    if share == 0:
        return list(samples), []
    order = list(range(len(samples)))
    random.Random(f"{seed}/held-out").shuffle(order)
    count = min(max(1, round(share * len(samples))), len(samples) - 1)
    held = set(order[:count])
    return [s for i, s in enumerate(samples) if i not in held], [s for i, s in enumerate(samples) if i in held]


def supervised_share(samples: Sequence[Sample]) -> tuple[int, int]:
    """(supervised tokens, all tokens) of samples."""
    return sum(len(s.labels) - s.labels.count(IGNORE) for s in samples), sum(len(s.labels) for s in samples)
