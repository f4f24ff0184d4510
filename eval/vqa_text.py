"""How VQA scorers make answers comparable: punctuation, numbers, articles, contractions.

Rules of GT-Vision-Lab/VQA vqaEval.py (a013f00) and of EvalAI's processor (LLaVA c121f04 m4c_evaluator.py).
"""

from __future__ import annotations

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
ARTICLES = frozenset({"a", "an", "the"})
STOPS = 32  # the scripts pass re.UNICODE where `count` stands, so that at most 32 full stops go
WITH_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've "
)


def _without_one(word: str) -> list[str]:
    """A word with each of its apostrophes left out in turn."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {
    **{bare: word for word in WITH_APOSTROPHE.split() for bare in _without_one(word)},
    "somebody'd": "somebodyd",  # the scripts' table has this one the wrong way round
}


def tidy(text: str) -> str:
    """Line feeds and tabs as spaces, none around."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Each mark gone if it stands beside a space or the text has a number like 1,000, else a space; full stops gone.

    A full stop before a digit stays.
    """
    out, thousands = text, re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=STOPS)


def plain_words(text: str) -> str:
    """Lower case, none and zero to ten as digits, no articles, contractions with their apostrophe, single spaces."""
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def official(text: str) -> str:
    """As vqaEval.py normalises where the ten answers are not all equal."""
    return plain_words(strip_punctuation(tidy(text)))


def evalai(text: str) -> str:
    """As EvalAI normalises: `official` after lower case, commas and question marks gone and 's apart."""
    return official(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())
