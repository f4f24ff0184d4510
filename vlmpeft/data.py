"""Conversations -> samples -> batches: encoded before training, images read when needed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmpeft.anyres import Tiling
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, Batch, collate
from vlmpeft.data_config import DataConfig
from vlmpeft.errors import DataError
from vlmpeft.records import Conversation
from vlmpeft.sample_store import Sample
from vlmpeft.sampling import micro_batches
from vlmpeft.template import Encoding, TurnEncoder

__all__ = ["Loaded", "Sample", "Samples", "encode_sample", "load_batches", "micro_batches", "truncated"]

FILLER = -1  # index of a sample without loss, for a process whose share of a step is empty


def truncated(
    encoding: Encoding, images: Sequence[Path], max_length: int, image_tokens: Sequence[int], policy: str
) -> tuple[Encoding, tuple[Path, ...]]:
    """Bring a conversation to at most `max_length` tokens without cutting an image or losing every answer token.

    Args: image_tokens: of each image.
    Raises: DataError D109 if the policy is not "right" or nothing supervised would be left.
    """
    length = len(encoding.input_ids)
    if length <= max_length:
        return encoding, tuple(images)
    ends = list(itertools.accumulate(image_tokens, initial=0))  # image tokens up to the start of each image, and all
    inside = encoding.input_ids[:max_length].count(IMAGE_TOKEN_ID)
    whole = bisect_right(ends, inside) - 1
    end = max_length - (inside - ends[whole])  # back to the start of the image that does not fit
    rows = encoding.input_ids[:end], encoding.labels[:end], encoding.turns[:end]
    cut = Encoding(*rows, tilings=encoding.tilings[:whole])
    if policy != "right" or cut.num_supervised == 0:
        needs = f"needs {length} tokens, data.max_length is {max_length}, images take {ends[-1]}."
        raise DataError("D109", needs, "raise data.max_length, or set data.truncate=skip.")
    return cut, tuple(images[:whole])


def encode_sample(
    conversation: Conversation,
    config: DataConfig,
    encoder: TurnEncoder,
    independent: bool,
    tiling: Callable[[Path], Tiling],
) -> Sample:
    """A conversation as ids and labels, a system prompt of its own in place of the encoder's.

    Args: tiling: how an image file is shown.
    Raises: DataError D107, D109, D110, D111, naming the record.
    """
    if conversation.system is not None:
        encoder = copy.copy(encoder)  # it shares the ids of known texts
        encoder.system = conversation.system
    try:
        tilings = [tiling(path) for path in conversation.images]
        tokens = [encoder.tokens_of(found) for found in tilings]
        encoding = encoder.encode(conversation.exchanges, independent, tilings)
        whole = len(encoding.input_ids)
        encoding, images = truncated(encoding, conversation.images, config.max_length, tokens, config.truncate)
        if encoding.num_supervised == 0:
            message = "no token carries a loss: the template supervises nothing here."
            raise DataError("D110", message, "check the answers and the template.")
        placeholders = encoding.input_ids.count(IMAGE_TOKEN_ID)
        if placeholders != sum(tokens[: len(images)]):
            message = f"{len(images)} images but room for {placeholders} image tokens."
            raise DataError("D107", message, "choose a template that shows every image.")
    except DataError as error:
        raise DataError(error.code, f"{conversation.where}: {error.message}", error.fix) from error
    ids, labels, turns = (array("i", row) for row in (encoding.input_ids, encoding.labels, encoding.turns))
    return Sample(conversation.uid, ids, labels, turns, images, tuple(encoding.tilings), whole - len(ids))


@dataclass(frozen=True)
class Fault:
    """A DataError as a value: worker processes cannot hand over the error itself."""

    code: str
    message: str
    fix: str

    def error(self) -> DataError:
        """The error again."""
        return DataError(self.code, self.message, self.fix)


class Samples(Dataset[tuple[Sample, list[Tensor]] | Fault]):
    """Samples with their images, read lazily.

    Args: load: file -> pixels (v, 3, h, w) or features (v, n, d) of the v views of an image.
    Items: a sample and a tensor for each view of each image, in order of appearance.
    """

    def __init__(self, samples: Sequence[Sample], load: Callable[[Path], Tensor]) -> None:
        self.samples, self.load = samples, load

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, list[Tensor]] | Fault:
        sample = self._filler() if index == FILLER else self.samples[index]
        try:
            return sample, [view for path in sample.images for view in self.load(path)]
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
            raise item.error()
        yield item
