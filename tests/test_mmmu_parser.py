"""MMMU's parsers: each case derived by hand from the rule named beside it, then outputs recorded from the originals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmpeft.eval import mmmu
from vlmpeft.eval.choices import Item, parse_strict
from vlmpeft.eval.mmmu_parse import gold_texts, normalise, parse_multi_choice_lmms_eval

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


OPEN = [
    # (response, candidates, rule): strip white space, full stops at both ends, lower case
    ("Paris", ["paris"], "lower case"),
    ("  Paris.  ", ["paris"], "white space, then stops"),
    (".963", [963.0], "the stop in front goes too"),
    ("Paris. ", ["paris"], "white space goes first"),
    ("42.", [42.0], "a number once the stop is gone"),
    ("", [""], "the whole response, empty"),
    ("...", [""], "only stops"),
    # the end after the last occurrence of an indicator, the shortest of several
    ("The answer is Paris", ["paris"], "is "),
    ("It could be Rome", ["rome"], "could be "),
    ("so Rome", ["rome"], "so "),
    ("thus Rome", ["rome"], "thus "),
    ("therefore Rome", ["rome"], "therefore "),
    ("final Rome", ["rome"], "final "),
    ("answer Rome", ["rome"], "answer "),
    ("result Rome", ["rome"], "result "),
    ("this Rome", ["rome"], "a plain substring: this "),
    ("also Rome", ["rome"], "a plain substring: also "),
    ("The answer: Rome", ["the answer: rome"], "answer without its space is none"),
    ("is it so old", ["old"], "the shorter of 'it so old' and 'old'"),
    ("is a is b c", ["b c"], "after the last is"),
    ("it is is", ["is"], "the end after the first, the second has no space"),
    ("The result is the final answer Rome", ["rome"], "the shortest of four"),
    ("the answer is :", ["the answer is :"], "a single mark is dropped, so the whole response"),
    ("the answer is ?", ["the answer is ?"], "a single mark is dropped, so the whole response"),
    ("the answer is ?!", ["?!"], "two marks are not"),
    # an equals sign in the last line only
    ("x = y z", ["y z"], "the last line"),
    ("x = 3", [3.0], "a number"),
    ("x=1\ny", ["x=1\ny", 1.0], "not the last line, so the whole response"),
    ("a = b = c d", ["c d"], "after the last"),
    ("is x = y z", ["y z"], "the shortest of both"),
    # line breaks split, sentences do not
    ("it is red\nit is blue", ["red", "blue"], "an end of each line"),
    ("red\nit is blue", ["blue"], "lines without an indicator give nothing"),
    ("red\nblue", ["red\nblue"], "no end at all: the whole response"),
    ("The value is 30. The unit is meters", ["meters"], "the split at sentences never fires"),
    # numbers found in the ends
    ("it is 30 watts", ["30 watts", 30.0], "a plain integer"),
    ("it is 30watts", ["30watts"], "a letter follows: no number"),
    ("it is 3.5 m", ["3.5 m", 3.5], "a decimal"),
    ("it is .5 m", [".5 m", 0.5], "a decimal without a leading digit"),
    ("it is -3 m", ["-3 m", -3.0], "negative"),
    ("20-30", ["20-30", 20.0, -30.0], "the hyphen belongs to the second"),
    ("1,249 m", ["1,249 m", 1249.0, 249.0], "grouped; the digits before a comma are no plain number, 249 is"),
    ("1,249,000", [1249000.0, 0.0], "grouped, and 000 as a plain integer"),
    ("it is 2e3 m", ["2e3 m", 2000.0, 3.0], "scientific, and the exponent as a plain number"),
    ("25e-1 m", ["25e-1 m", 2.5, -1.0], "scientific, with a negative exponent"),
    ("5,6 m", ["5,6 m", 6.0], "digits before a comma are none"),
    ("about 7 or 8 of them", ["about 7 or 8 of them", 7.0, 8.0], "all of them"),
    # normalised: two decimals; one character in two variants
    ("3.14159", [3.14], "two decimals"),
    ("0.004", [0.0], "two decimals"),
    ("1e3", [1000.0, 3.0], "whatever float takes"),
    ("1_x", ["1_x"], "an underscore joins: no number"),
    ("1_0", [10.0, 0.0], "float takes an underscore; 0 ends it as a plain number"),
    ("inf", [float("inf")], "infinity too"),
    ("\u0663", [3.0], "Arabic digits too"),
    ("1,000", [1000.0, 0.0], "without its commas; 000 as well"),
    ("x", [" x", "x "], "one character"),
    ("it is B", [" b", "b "], "one character at the end"),
    ("xy", ["xy"], "two characters"),
    ("$5", ["$5", 5.0], "a text and its number"),
    ("5%", ["5%", 5.0], "a text and its number"),
    ("24/7", ["24/7", 24.0, 7.0], "both numbers"),
    ("thirty", ["thirty"], "a word is no number"),
    ("+5", [5.0], "float takes a sign"),
    ("it is 10\nso x = 12", [10.0, 12.0], "numbers of two lines"),
]


@pytest.mark.parametrize(("response", "candidates", "rule"), OPEN, ids=[repr(c[0]) for c in OPEN])
def test_open_response_gives_the_official_candidates(response: str, candidates: list[str | float], rule: str) -> None:
    found = mmmu.parse_open(response)
    assert sorted(found, key=str) == sorted(candidates, key=str), rule
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("no", "unknown", True),  # a gold text has to be contained, no more
        ("meters", "The value is 30. The unit is meters", True),
        ("30", "The value is 30. The unit is meters", False),  # the number is lost with its sentence
        ("0.001", "0.004", True),  # equal once rounded
        ("30", "thirty", False),  # numbers and texts never match
        ("thirty", "30", False),
        ("30", "it is 30 watts", True),
        ("30 watts", "30", False),
        ("1,000", "1000", True),
        ("b", "it is b", True),
        ("b", "blue", False),  # one character needs a space beside it
        ("b", "a b", True),
        ("Paris", "it is paris, france", True),
        ("paris, france", "Paris", False),
        ("['24/7', '3.429']", "3.43", True),  # several right answers as the repr of a list
        ("['24/7', '3.429']", "24/7", True),
        ("['24/7', '3.429']", "24", False),
        (("x", "7"), "7", True),
        ("[", "[", True),  # no list: a text
        ("nan", "nan", False),  # not equal to itself
    ],
)
def test_open_answer_is_right_by_the_official_rule(gold: str | tuple[str, ...], response: str, right: bool) -> None:
    assert mmmu.is_correct_open(gold, response) is right


def test_only_a_list_is_several_answers() -> None:
    assert gold_texts("['a', 'b']") == ("a", "b")
    assert [gold_texts(text) for text in ("(1, 2)", "{'a': 1}", "3", "[]", "open('x')")] == [
        ("(1, 2)",), ("{'a': 1}",), ("3",), ("[]",), ("open('x')",),
    ]  # fmt: skip


def test_150_choices_equal_those_of_the_original_scripts() -> None:
    for response, letters, official, lmms_eval in GOLDEN["choice"]:
        options = GOLDEN["options"][letters]
        assert mmmu.parse_multi_choice(response, options) == official, response
        assert parse_multi_choice_lmms_eval(response, options) == lmms_eval, response
    assert len(GOLDEN["choice"]) == 150


def test_150_open_answers_equal_those_of_the_original_script() -> None:
    for response, candidates, gold, right in GOLDEN["open"]:
        assert sorted(map(repr, mmmu.parse_open(response))) == candidates, response
        assert mmmu.is_correct_open(gold, response) is right, response
    assert {right for *_, right in GOLDEN["open"]} == {True, False}


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


GOLD_OPEN = Item("validation_Math_1", {}, ("steel", "iron"))


@pytest.mark.parametrize(
    ("response", "parsed", "right", "why"),
    [
        ("A", "A", True, "A stands for the right text"),
        ("B", "B", False, 'B stands for "Other Answers"'),
        ("steel", "A", True, "the only option text in a short answer"),
        ("It is IRON", "A", True, "in any case, and any of several right texts"),
        ("copper", None, False, "neither"),
        ("Other answers", "B", False, "the other option's text"),
        (
            "it might well be that all of this is made of nothing but steel",
            None,
            False,
            "longer than twice the options",
        ),
        ("", None, False, "nothing"),
    ],
)
def test_vlmevalkit_makes_a_choice_of_two_of_an_open_question(
    response: str, parsed: str | None, right: bool, why: str
) -> None:
    verdict = mmmu.BENCHMARK.judge("vlmevalkit")(GOLD_OPEN, response)
    assert (verdict.parsed, verdict.correct, verdict.by_chance) == (parsed, right, False), why


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


def test_one_character_is_normalised_to_two_variants_and_a_number_to_one() -> None:
    assert normalise(" B ") == [" b", "b "]
    assert normalise("7") == [7.0]
