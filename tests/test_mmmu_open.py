"""MMMU's parser of open answers: each case derived by hand from the rule beside it, then outputs of the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmpeft.eval import mmmu
from vlmpeft.eval.choices import Item
from vlmpeft.eval.mmmu_parse import gold_texts, normalise

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mmmu_parser.json").read_text(encoding="utf-8"))

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


def test_150_open_answers_equal_those_of_the_original_script() -> None:
    for response, candidates, gold, right in GOLDEN["open"]:
        assert sorted(map(repr, mmmu.parse_open(response))) == candidates, response
        assert mmmu.is_correct_open(gold, response) is right, response
    assert {right for *_, right in GOLDEN["open"]} == {True, False}


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


def test_one_character_is_normalised_to_two_variants_and_a_number_to_one() -> None:
    assert normalise(" B ") == [" b", "b "]
    assert normalise("7") == [7.0]
