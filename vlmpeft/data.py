"""Conversations -> samples -> batches. Sampling is a pure function of seed and epoch, so a position is a step number."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
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
from vlmpeft.template import Encoding, TurnEncoder

POOL = 16  # batches whose samples are sorted by length together
SHOWN = 20  # bad records on the screen; all of them go to a file


@dataclass(frozen=True)
class Sample:
    """One training sample: ids, labels and turns (see `Batch`), and its image files in order of appearance."""

    uid: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    turns: tuple[int, ...]
    images: tuple[Path, ...]


def truncated(encoding: Encoding, images: Sequence[Path], max_length: int, image_tokens: int, policy: str) -> tuple[Encoding, tuple[Path, ...]]:
    """Bring a conversation to at most `max_length` tokens without cutting an image or losing every answer token.

    Raises: DataError D109 if the policy is "error" or nothing supervised would be left.
    """
    length = len(encoding.input_ids)
    if length <= max_length:
        return encoding, tuple(images)
    end = max_length - encoding.input_ids[:max_length].count(IMAGE_TOKEN_ID) % image_tokens  # back to the image's start
    cut = Encoding(encoding.input_ids[:end], encoding.labels[:end], encoding.turns[:end])
    if policy != "right" or cut.num_supervised == 0:
        raise DataError("D109", f"needs {length} tokens, data.max_length is {max_length}, images take {image_tokens * len(images)}.", "raise data.max_length, or set data.truncate=skip.")
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


def prepare(path: Path, config: DataConfig, encoder: TurnEncoder, independent: bool, report: Path | None = None) -> Prepared:
    """Check and encode every record of a file before anything trains on it.

    Args:
        independent: encode turns as independent (see `TurnEncoder.encode`).
        report: where the list of bad records goes.

    Raises: DataError: D100 if records are bad and the policy is "error", or too many of them.
    """
    parse = RecordParser(path, Path(config.images) if config.images else None, config.auto_image_token, config.verify_images)
    samples: list[Sample] = []
    bad: list[DataError] = []
    too_long: list[DataError] = []
    for index, record in enumerate(tqdm(read_records(path), desc=f"check {path.name}", unit="record", leave=False)):
        try:
            samples.append(_sample(parse(index, record), config, encoder, independent))
        except DataError as error:
            (too_long if error.code == "D109" and config.truncate == "skip" else bad).append(error)
    if report and (bad or too_long):
        fs.write_text(report, "".join(json.dumps({"code": e.code, "message": e.message, "fix": e.fix}) + "\n" for e in bad + too_long))
    if bad and (config.on_bad_sample == "error" or len(bad) > config.max_bad_fraction * (len(samples) + len(bad) + len(too_long))):
        raise _refusal(path, bad, len(samples) + len(bad) + len(too_long), config, report)
    if not samples:
        raise DataError("D112", f"{path}: no record is left to train on ({len(too_long)} are longer than data.max_length).", "raise data.max_length.")
    digest = hashlib.sha256("\n".join(f"{s.uid} {s.input_ids} {s.labels}" for s in samples).encode())
    return Prepared(samples, bad + too_long, digest.hexdigest()[:16])


def _refusal(path: Path, bad: list[DataError], records: int, config: DataConfig, report: Path | None) -> DataError:
    if len(bad) == 1 and config.on_bad_sample == "error":
        return bad[0]
    listed = " | ".join(e.line() for e in bad[:SHOWN])
    where = f" All are listed in {report}." if report else ""
    if config.on_bad_sample == "skip":
        return DataError("D100", f"{path}: {len(bad)} of {records} records are bad, more than data.max_bad_fraction={config.max_bad_fraction}: {listed}{where}", "mend them or raise data.max_bad_fraction.")
    return DataError("D100", f"{path}: {len(bad)} of {records} records are bad: {listed}{where}", "mend them or set data.on_bad_sample=skip.")


def _sample(conversation: Conversation, config: DataConfig, encoder: TurnEncoder, independent: bool) -> Sample:
    try:
        encoding = encoder.encode(conversation.exchanges, independent)
        encoding, images = truncated(encoding, conversation.images, config.max_length, encoder.image_tokens, config.truncate)
        if encoding.num_supervised == 0:
            raise DataError("D110", "no token carries a loss: the template supervises nothing here.", "check the answers and the template.")
        placeholders = encoding.input_ids.count(IMAGE_TOKEN_ID)
        if placeholders != encoder.image_tokens * len(images):
            raise DataError("D107", f"{len(images)} images but room for {placeholders} image tokens.", "template=plain takes the images of the first question only.")
    except DataError as error:
        raise DataError(error.code, f"{conversation.where}: {error.message}", error.fix) from error
    return Sample(conversation.uid, tuple(encoding.input_ids), tuple(encoding.labels), tuple(encoding.turns), images)


def epoch_batches(samples: Sequence[Sample], size: int, group: str, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each optimizer step of an epoch: a permutation of all samples, a pure function of its arguments.

    Args:
        size: samples a step sees over all processes.
        group: "none"; "length" puts samples of like length (image tokens counted) together; "modality" does so within
            image and text-only samples, and only the last batch of an epoch mixes both.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(samples)))
    rng.shuffle(order)
    if group == "none":
        return [order[i : i + size] for i in range(0, len(order), size)]
    kinds = [order] if group == "length" else [[i for i in order if samples[i].images], [i for i in order if not samples[i].images]]
    batches: list[list[int]] = []
    tail: list[int] = []
    for kind in kinds:
        whole = len(kind) - len(kind) % size
        tail += kind[whole:]
        for start in range(0, whole, size * POOL):
            pool = sorted(kind[start : min(start + size * POOL, whole)], key=lambda i: -len(samples[i].input_ids))
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches + [tail[i : i + size] for i in range(0, len(tail), size)]


def micro_batches(step: Sequence[int], micro: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """A process's share of a step, in forwards of at most `micro` samples. Every process gets as many forwards."""
    forwards = max(1, -(-len(step) // (micro * world)))
    share = list(step[rank::world])
    return [share[i::forwards] for i in range(forwards)] if forwards > 1 else [share]


class Samples(Dataset[tuple[Sample, list[Tensor]] | DataError]):
    """Samples with their images, read lazily. Args: load: file -> (3, h, w) pixels or (n, d) features."""

    def __init__(self, samples: Sequence[Sample], load: Callable[[Path], Tensor]) -> None:
        self.samples, self.load = samples, load

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, list[Tensor]] | DataError:
        sample = self.samples[index]
        try:
            return sample, [self.load(path) for path in sample.images]
        except DataError as error:  # handed over as a value: worker processes lose the type of what they raise
            return DataError(error.code, f'sample "{sample.uid}": {error.message}', error.fix)


@dataclass(frozen=True)
class Loaded:
    """A batch and the ids of its samples."""

    batch: Batch
    uids: tuple[str, ...]


def _collate(items: Sequence[tuple[Sample, list[Tensor]] | DataError]) -> Loaded | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    pairs = [item for item in items if not isinstance(item, DataError)]
    images = [image for _, images in pairs for image in images]
    return Loaded(collate([sample for sample, _ in pairs], images), tuple(sample.uid for sample, _ in pairs))


def load_batches(dataset: Samples, indices: Sequence[Sequence[int]], workers: int, pin: bool = False) -> Iterator[Loaded]:
    """Batches for the given index lists, in order. Raises: DataError for a file that went bad since preflight."""
    loader: DataLoader = DataLoader(
        dataset, batch_sampler=list(map(list, indices)), num_workers=workers, collate_fn=_collate, pin_memory=pin, generator=torch.Generator()
    )
    for item in loader:
        if isinstance(item, DataError):
            raise item
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
    return sum(sum(label != IGNORE for label in s.labels) for s in samples), sum(len(s.labels) for s in samples)
