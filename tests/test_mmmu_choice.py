"""MMMU's choice parsers: each case derived by hand from the rule beside it, then outputs of the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmpeft.eval import mmmu
from vlmpeft.eval.choices import Item, parse_strict, parse_vlmevalkit
from vlmpeft.eval.mmmu_parse import parse_multi_choice_lmms_eval

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mmmu_parser.json").read_text(encoding="utf-8"))
FOUR = {"A": "cell wall", "B": "Nucleus", "C": "10", "D": "100"}
NINE = dict(zip("ABCDEFGHI", ("1", "2", "3", "4", "5", "6", "7", "8", "9"), strict=True))

CHOICES = [
    # one character kind after another is stripped from both ends, in the order , . ! ? ; : '
    ("B", "B", "alone"),
    ("B.", "B", "a full stop"),
    ("B,", "B", "a comma"),
    ("B!", "B", "an exclamation mark"),
    ("B?", "B", "a question mark"),
    ("B;", "B", "a semicolon"),
    ("B:", "B", "a colon"),
    ("'B'", "B", "quotes are the last kind"),
    ("B...", "B", "as many of one kind as there are"),
    ("...B", "B", "at the front too"),
    ("B.,", "B", "the comma goes first, then the stop"),
    ("B,.", None, "the stop hides the comma, which had its turn"),
    ("B!.", "B", "the stop goes before the mark"),
    ("B!?", None, "the question mark hides the other, which had its turn"),
    ("B':", "B", "the colon goes before the quote"),
    ("B'.", "B", "the stop goes before the quote"),
    ("'B.'", None, "the quotes hide the stop"),
    # white space is not stripped
    ("B\n", None, "a line feed stays, so no space follows"),
    ("\nB", None, "nor does one precede"),
    ("B. ", None, "a space shields the stop"),
    (" B ", "B", "spaces do no harm"),
    ("B\t", None, "a tab is no space"),
    # (X) wins over X
    ("(B)", "B", "in brackets"),
    ("(B) because A is wrong", "B", "brackets win over the single A"),
    ("The answer is (C).", "C", "in brackets, in a sentence"),
    ("**(B)**", "B", "brackets are looked for anywhere"),
    ("(b)", None, "case counts"),
    ("(E)", None, "only letters of options"),
    ("( B )", "B", "a letter between spaces"),
    ("[B]", None, "other brackets are not seen"),
    # several: the one whose last occurrence is rightmost
    ("(A) is wrong. (C) is right. The answer is B", "C", "among the bracketed, not the bare B"),
    ("(A) or (B)", "B", "the last"),
    ("(B) or (A)", "A", "the last, whatever the alphabet says"),
    ("(A), (B), no: (A)", "A", "by last occurrence, not by first"),
    ("A or B ?", "B", "bare letters likewise"),
    ("either B or A then", "A", "bare letters likewise"),
    # X between spaces
    ("Answer: B", "B", "a space and the end"),
    ("The answer is B", "B", "at the end"),
    ("B is right", "B", "at the start"),
    ("A cell has a nucleus", "A", "the article counts as the letter"),
    ("a cell has it", None, "a small a does not"),
    ("The answer is B.", "B", "the final stop is stripped"),
    ("The answer is B. Yes", None, "a stop inside the text stays"),
    ("B) Nucleus", None, "a bracket alone is no form"),
    ("B. Nucleus", None, "a stop is no form"),
    ("B, Nucleus", None, "nor a comma"),
    ("B: Nucleus", None, "nor a colon"),
    ("**B**", None, "nor stars"),
    ("\\boxed{B}", None, "nor braces"),
    ('"B"', None, "double quotes are not stripped"),
    ("Answer:B", None, "no space in between"),
    ("b", None, "case counts"),
    ("AB", None, "two letters are none"),
    # texts of options, in responses of more than five words
    ("Nucleus", None, "too short for the texts"),
    ("it must be the nucleus", None, "five words are too short"),
    ("it must surely be the nucleus", "B", "six are enough, in any case"),
    ("I think it is the CELL WALL", "A", "in any case"),
    ("the nucleus lies within the cell wall", "A", "the rightmost text"),
    ("the cell wall lies around the nucleus", "B", "the rightmost text"),
    ("from this the number comes out as 100", "C", "10 and 100 start at one place: the earlier letter"),
    ("it is 100 but not any more 10", "C", "the rightmost, 10"),
    ("this is none of them at all", None, "no text is there"),
    ("I would say B. it is the nucleus", "B", "no letter form, so the text"),
    # nothing
    ("", None, "empty"),
    ("   ", None, "white space"),
    ("I do not know", None, "nothing of the kind"),
]


@pytest.mark.parametrize(("response", "letter", "rule"), CHOICES, ids=[repr(c[0]) for c in CHOICES])
def test_choice_follows_the_official_rules(response: str, letter: str | None, rule: str) -> None:
    assert mmmu.parse_multi_choice(response, FOUR) == letter, rule


def test_pronoun_is_the_ninth_option() -> None:
    assert mmmu.parse_multi_choice("The answer is C, I think", NINE) == "I"


def test_empty_option_text_is_contained_in_every_long_response() -> None:
    assert mmmu.parse_multi_choice("no letter is in this one", {"A": "x", "B": ""}) == "B"


def test_150_choices_equal_those_of_the_original_scripts() -> None:
    for response, letters, official, lmms_eval in GOLDEN["choice"]:
        options = GOLDEN["options"][letters]
        assert mmmu.parse_multi_choice(response, options) == official, response
        assert parse_multi_choice_lmms_eval(response, options) == lmms_eval, response
    assert len(GOLDEN["choice"]) == 150


@pytest.mark.parametrize(
    ("response", "official", "lmms_eval"),
    [("it is DNA surely", None, "A"), ("B. Nucleus", None, "B"), ("xB y (C)", "C", "C"), ("QA or QB ok", None, "A")],
)
def test_lmms_eval_sees_letters_that_the_official_parser_does_not(
    response: str, official: str | None, lmms_eval: str
) -> None:
    assert mmmu.parse_multi_choice(response, FOUR) == official
    assert parse_multi_choice_lmms_eval(response, FOUR) == lmms_eval


@pytest.mark.parametrize("response", ["B", " B\n", "(B)", "B.", "B)", "B:"])
def test_strict_takes_the_letter_alone(response: str) -> None:
    assert parse_strict(response, FOUR) == "B"


@pytest.mark.parametrize("response", ["", "b", "E", "B Nucleus", "The answer is B", "(B", "B.)", "A B", "**B**"])
def test_strict_takes_nothing_else(response: str) -> None:
    assert parse_strict(response, FOUR) is None


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B. Nucleus", "B"), ("**B**", "B"), ("[B]", "B"), ("Answer:B", "B"), ("\\boxed{B}", "B"), ("b", None),
        ("A cell has a nucleus", "B"),  # the fifth word from the end is too far: an option's text decides
        ("A cell has nuclei", "A"), ("B is what one finds in a cell", None), ("A or B", None), ("B\n", "B"),
        ("nucleus", "B"), ("the cell wall, not the nucleus", None), ("I don't know", None), ("", None),
    ],
)  # fmt: skip
def test_vlmevalkit_reads_a_choice_by_its_own_rules(response: str, letter: str | None) -> None:
    verdict = mmmu.BENCHMARK.judge("vlmevalkit")(Item("x", FOUR, "B"), response)
    assert (verdict.parsed, verdict.by_chance) == (letter, False)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("of these take B as my answer", "B"),  # fourth from the end
        ("of these take B as my own answer", None),  # fifth from the end
        ("B is it I say", None),  # fifth from the end, and the first of all
        ("B it is then", "B"),
        ("B or to say it again, B", None),  # the first place of a letter counts
        ("B it is, B", "B"),
        ("(B) it. is! then?", "B"),  # punctuation makes no word
        ("the answer is B as far as I can tell", "B"),  # "answer is X" at any place
        ("The correct answer is **B** as far as I can tell", "B"),
        ("answer is b for the reasons given in the text above", "B"),  # in any case
    ],
)
def test_vlmevalkit_sees_a_letter_among_the_last_four_words(response: str, letter: str | None) -> None:
    """`splits.index(ch) > (len(splits) - 5)`: places n - 4 to n - 1 of n words, though it speaks of five.

    Source: can_infer_option of vlmeval/utils/matching_util.py at e8e78f05. At 134b4ea, line 45, the sign is turned
    round (`< len(splits) - 5`), and at 18fc37a, line 45, any place will do.
    """
    assert parse_vlmevalkit(response, FOUR) == letter
