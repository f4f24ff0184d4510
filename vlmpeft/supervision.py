"""Whether a sample's loss falls on its record's answers and on nothing else.

The record is read anew and its answers are encoded apart from any template, so that a template whose labels are wrong
is not compared with itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.batch import IGNORE
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.errors import DataError
from vlmpeft.mixture import Mixture
from vlmpeft.readers import read_records
from vlmpeft.records import Conversation, RecordParser
from vlmpeft.sample_store import Sample

SHOWN = 60  # characters of a text in a message


def conversation_of(samples: Mixture, index: int, files: Sequence[DataFile], config: DataConfig) -> Conversation:
    """The record that a sample was made of."""
    number, row = samples.place(index)
    file, faults = files[number], samples.stores[number].faults()
    record = next(itertools.islice((i for i in itertools.count() if i not in faults), row, None))
    folder = file.images or config.images
    parse = RecordParser(
        Path(file.path), Path(folder) if folder else None, config.auto_image_token, "none", config.max_image_pixels
    )
    return parse(record, next(itertools.islice(read_records(Path(file.path)), record, None)))


def supervised_texts(sample: Sample, tokenizer: Any) -> Iterator[str]:
    """The text of every run of supervised tokens."""
    for label, run in itertools.groupby(sample.labels, key=lambda label: label != IGNORE):
        if label:
            yield _decoded(list(run), tokenizer)


def check_supervision(sample: Sample, conversation: Conversation, tokenizer: Any) -> None:
    """Raise DataError D113 unless exactly the record's answers, each with the mark of its end, are supervised.

    Spaces and line breaks do not count: a template may set them.
    """
    ids, labels = sample.input_ids, sample.labels
    if any(label not in (IGNORE, token) for token, label in zip(ids, labels, strict=True)):
        raise _refusal(conversation, "a label is not the token it stands at")
    answers = [_plain(exchange.answer or "", tokenizer) for exchange in conversation.exchanges]
    texts = [_bare(text) for text in supervised_texts(sample, tokenizer)]
    if len(texts) > len(answers) or (len(texts) < len(answers) and not sample.cut):
        raise _refusal(conversation, f"{len(texts)} supervised texts for {len(answers)} answers")
    for number, (text, answer) in enumerate(zip(texts, answers, strict=False), start=1):
        broken_off = sample.cut > 0 and number == len(texts) and answer.startswith(text)
        if not broken_off and (not text.startswith(answer) or not _is_mark(text.removeprefix(answer), tokenizer)):
            message = f"answer {number} is '{answer:.{SHOWN}}', supervised is '{text:.{SHOWN}}'"
            raise _refusal(conversation, message)


def _refusal(conversation: Conversation, message: str) -> DataError:
    fix = "choose a template that supervises the answers alone; vlmpeft inspect shows the tokens."
    return DataError("D113", f"{conversation.where}: {message}.", fix)


def _plain(answer: str, tokenizer: Any) -> str:
    """An answer as the tokenizer gives it back, letters it does not know included."""
    ids = tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return _bare(_decoded(ids, tokenizer))


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _bare(text: str) -> str:
    """Text without spaces and line breaks."""
    return "".join(text.split())


def _is_mark(text: str, tokenizer: Any) -> bool:
    """Whether what follows an answer is a mark of its end: tokens of the tokenizer's own, or signs without letters."""
    for token in sorted((*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()), key=len, reverse=True):
        text = text.replace(_bare(token), "")
    return not any(letter.isalnum() for letter in text)
