"""Samples as people read them: text with the trained tokens marked, and what a whole file comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.errors import DataError, printable
from vlmpeft.sample_store import Sample
from vlmpeft.template import WORD_START

GREEN, CYAN, PLAIN = "\x1b[1;32m", "\x1b[36m", "\x1b[0m"
PERCENTS = {"min": 0, "median": 50, "90 %": 90, "99 %": 99, "max": 100}
LISTED = 5  # records left out that are shown


def sample_text(sample: Sample, tokenizer: Any, colour: bool) -> str:
    """A sample's head line and text: supervised tokens green or in [[ ]], images as <image xTOKENS>."""
    supervised = sum(label != IGNORE for label in sample.labels)
    length = len(sample.input_ids)
    images = f", {len(sample.images)} images" if len(sample.images) != 1 else ", 1 image"
    head = f'"{printable(sample.uid)}": {length} tokens{images if sample.images else ""}'
    out = []
    spans = groupby(
        zip(sample.input_ids, sample.labels, sample.turns, strict=True),
        key=lambda row: (row[0] == IMAGE_TOKEN_ID, row[1] != IGNORE, row[2]),
    )
    for (image, answer, _), rows in spans:
        ids = [row[0] for row in rows]
        text = f"<image x{len(ids)}>" if image else _decoded(ids, tokenizer)
        paint = CYAN if image else GREEN if answer else ""
        if colour and paint:
            text = f"{paint}{text}{PLAIN}"
        elif answer:
            text = f"[[{text}]]"
        out.append(text)
    return f"{head}, {supervised} supervised ({supervised / length:.1%})\n{''.join(out)}"


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    """Text of ids in the middle of a sequence, line breaks kept, other control characters escaped."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    begins_word = tokenizer.convert_ids_to_tokens(ids[:1])[0].startswith(WORD_START)
    if begins_word and not text.startswith(" "):  # SentencePiece takes the first space away
        text = " " + text
    return "\n".join(map(printable, text.split("\n")))


def totals_text(lengths: Any, supervised: Any, pictures: Any, faults: Sequence[DataError]) -> str:
    """What a file's samples come to. Args: tokens, supervised tokens and images of each; why others were left out."""
    used, tokens = len(lengths), int(np.sum(lengths))
    lines = [f"records {used + len(faults):,} = used {used:,} + skipped {len(faults):,}"]
    if used:
        shown = int(np.count_nonzero(pictures))
        lines.append(f"with images {shown:,} ({int(np.sum(pictures)):,} images), text alone {used - shown:,}")
        cuts = np.percentile(lengths, list(PERCENTS.values()), method="nearest")
        lines.append("length " + ", ".join(f"{name} {cut:,}" for name, cut in zip(PERCENTS, cuts, strict=True)))
        share = int(np.sum(supervised))
        lines.append(f"tokens {tokens:,}, supervised {share:,} ({share / tokens:.1%})")
    if faults:
        codes = sorted(Counter(error.code for error in faults).items())
        lines.append("skipped " + ", ".join(f"{code} {count:,}" for code, count in codes))
        lines += [f"  {error.line()}" for error in faults[:LISTED]]
    return "\n".join(lines)
