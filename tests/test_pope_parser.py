"""POPE's official parser, rule by rule."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from vlmpeft.eval import pope

# (text, expected, rule of POPE evaluate.py that decides it)
PARSED = [
    # "keep the part before the first full stop"
    ("Yes. There is no dog.", "yes", "what follows the first stop is not read"),
    ("No. Yes.", "no", "what precedes it is"),
    ("1. No", "yes", "a list number ends the text"),
    ("A. No", "yes", "so does an option letter"),
    ("Mr. No", "yes", "so does an abbreviation"),
    ("Yes, I do. No, wait.", "yes", "the correction comes too late"),
    (".no", "yes", "an empty head has no token No, no or not"),
    ("no.", "no", "the stop itself is dropped"),
    ("No.5 is here", "no", "no space is needed after the stop"),
    ("The dog is 3.5 m away, no", "yes", "a decimal point is a stop too"),
    ("...no", "yes", "the head of an ellipsis is empty"),
    # "delete every comma", without putting a space there
    ("No,there is", "yes", "becomes 'Nothere is'"),
    ("No, there is", "no", "becomes 'No there is'"),
    ("no,", "no", "becomes 'no'"),
    (",no", "no", "becomes 'no'"),
    ("n,o", "no", "becomes 'no'"),
    ("yes,no", "yes", "becomes 'yesno'"),
    ("yes, no", "no", "becomes 'yes no'"),
    ("Well,no dog", "yes", "becomes 'Wellno dog'"),
    # "split on single spaces only"
    ("No\tdog", "yes", "a tab does not split"),
    ("No\n", "yes", "a line feed does not split"),
    ("No\nthere is none", "yes", "nor in the middle"),
    ("No\u00a0dog", "yes", "nor does a no-break space"),
    ("  no  ", "no", "surrounding spaces make empty tokens, no harm"),
    ("there is  no  dog", "no", "two spaces make an empty token between"),
    # "no if any token is exactly No, no or not"
    ("No", "no", "No"),
    ("no", "no", "no"),
    ("not", "no", "not"),
    ("There is not a dog", "no", "not anywhere in the text"),
    ("I see no dog", "no", "no anywhere in the text"),
    ("yes and no", "no", "one no is enough"),
    ("yes or not", "no", "one not is enough"),
    ("Not sure, but no", "no", "the second no decides, Not does not"),
    ("No dog but yes a cat", "no", "the order does not matter"),
    ("NO", "yes", "upper case is no token of the three"),
    ("Not", "yes", "a capital Not neither"),
    ("NOT", "yes", "nor NOT"),
    ("nO", "yes", "nor nO"),
    ("None", "yes", "exact tokens, not prefixes"),
    ("nope", "yes", "exact tokens, not prefixes"),
    ("Nothing", "yes", "exact tokens, not prefixes"),
    ("cannot", "yes", "exact tokens, not suffixes"),
    ("unknown", "yes", "exact tokens, not substrings"),
    ("snow", "yes", "exact tokens, not substrings"),
    ("No!", "yes", "only stops and commas are removed"),
    ("No;", "yes", "a semicolon sticks to the token"),
    ("No: none", "yes", "a colon sticks to the token"),
    ("no-one", "yes", "a hyphen does not split"),
    ("(No)", "yes", "brackets stick to the token"),
    ("**No**", "yes", "markdown sticks to the token"),
    ('"No"', "yes", "quotes stick to the token"),
    ("isn't", "yes", "a contraction is no token of the three"),
    ("I don't see any", "yes", "neither is this"),
    # "otherwise yes": there is no class for junk
    ("", "yes", "empty text"),
    (" ", "yes", "white space"),
    ("banana", "yes", "junk"),
    ("\u5426", "yes", "another language"),
    ("Yes", "yes", "Yes"),
    ("yes.", "yes", "a full stop is not held against it, as lmms-eval would"),
    ("YES", "yes", "yes is never looked for"),
    ("yes not", "no", "not after yes decides"),
    ("I can not tell", "no", "not of another verb counts"),
    ("no_dog", "yes", "an underscore does not split"),
    ("no/yes", "yes", "nor does a slash"),
    ("No\r", "yes", "nor a carriage return"),
]


@pytest.mark.parametrize(("text", "expected", "rule"), PARSED, ids=[repr(case[0]) for case in PARSED])
def test_parser_follows_the_official_rules(text: str, expected: str, rule: str) -> None:
    assert pope.parse_answer(text) == expected, rule


def by_regular_expression(text: str) -> str:
    """The same rules as one pattern over the head of the text: No, no or not with a space or an end on both sides."""
    head = "".join(itertools.takewhile(lambda c: c != ".", text))
    return "no" if re.search(r"(?<![^ ])(?:[Nn]o|not)(?![^ ])", "".join(c for c in head if c != ",")) else "yes"


def test_parser_agrees_with_one_regular_expression_on_random_texts() -> None:
    pieces = [
        "No",
        "no",
        "not",
        "Not",
        "yes",
        "Yes",
        " ",
        " ",
        " ",
        ".",
        ",",
        "\n",
        "\t",
        "\u00a0",
        "n",
        "o",
        "t",
        "!",
        "",
    ]
    draw = random.Random(0)
    texts = ["".join(draw.choices(pieces, k=draw.randrange(9))) for _ in range(20000)]
    assert {pope.parse_answer(text) for text in texts} == {"yes", "no"}
    assert [t for t in texts if pope.parse_answer(t) != by_regular_expression(t)] == []


@pytest.mark.parametrize("text", ["", " ", "banana", "None", "nope", "isn't", "I don't see any", "yesterday", "snow"])
def test_answer_without_a_yes_or_no_word_is_unparsable(text: str) -> None:
    assert pope.is_unparsable(text)


@pytest.mark.parametrize("text", ["Yes", "NO", "**No**", "1. No", "Not.", "No\n", "yes!", "(no)"])
def test_answer_with_a_yes_or_no_word_is_not_unparsable_even_where_the_parser_misses_it(text: str) -> None:
    assert not pope.is_unparsable(text)
