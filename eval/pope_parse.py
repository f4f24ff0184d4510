"""POPE's parsers: the official one, those of two harnesses, and a strict one. Each gives yes, no, or None."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

from vlmpeft.errors import ConfigError, nearest
from vlmpeft.eval.vqa_text import strip_punctuation

YesNo = Literal["yes", "no"]


def parse_answer(text: str) -> YesNo:
    """The official parser: "no" if a token before the first full stop is No, no or not; otherwise "yes", junk included.

    Source: POPE 08d957b evaluate.py, identical to LLaVA's eval_pope.py. Commas are deleted (not replaced) and only
    single spaces split, so "No,there" is "yes".
    """
    tokens = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(tokens) else "yes"


def parse_lmms_eval(text: str) -> YesNo | None:
    """The whole text, in any case; "Yes." is neither. Source: lmms_eval/tasks/pope/utils.py at 75571cfe."""
    return _exactly(text.lower().strip())


def parse_vlmevalkit(text: str) -> YesNo | None:
    """The word yes or no, not both, in any case; "not" and "isn't" say neither.

    Source: VLMEvalKit e8e78f05 YOrN_Extraction, without its judge model.
    """
    words = strip_punctuation(text.lower()).split()
    said = [word for word in ("yes", "no") if word in words]
    return _exactly(said[0]) if len(said) == 1 else None


def parse_strict(text: str) -> YesNo | None:
    """The whole text, in any case, with a full stop at most."""
    return _exactly(text.strip().lower().removesuffix("."))


def _exactly(text: str) -> YesNo | None:
    return "yes" if text == "yes" else "no" if text == "no" else None


PARSERS: Mapping[str, Callable[[str], YesNo | None]] = {
    "official": parse_answer,
    "lmms-eval": parse_lmms_eval,
    "vlmevalkit": parse_vlmevalkit,
    "strict": parse_strict,
}


def parser_of(name: str) -> Callable[[str], YesNo | None]:
    """Raises: ConfigError C102 for an unknown name."""
    if name not in PARSERS:
        raise ConfigError("C102", f"no parser '{name}'{nearest(name, PARSERS)}")
    return PARSERS[name]


def is_unparsable(text: str, parser: str = "official") -> bool:
    """Whether a parser cannot read a text; the official one says yes to one without a word yes, no or not."""
    if parser == "official":
        return re.search(r"\b(yes|no|not)\b", text, re.IGNORECASE) is None
    return parser_of(parser)(text) is None
