"""MMMU's rules for answers (arXiv:2311.16502), as in its eval_utils.py at bb0b95a; chance is left to the caller."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from vlmpeft.eval.choices import Options

STRIPPED = ",.!?;:'"  # each once, in this order: "B.," becomes B, "B,." does not
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = frozenset(":,.!?;'")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # grouped by commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # plain
)


def parse_multi_choice(response: str, index2option: Options) -> str | None:
    """The letter a response chooses, or None where the official script draws one at random.

    Source: parse_multi_choice_response. Looked for in this order: "(B)", " B ", and in a response of more than five
    words an option's text; of several found, the one whose last occurrence is rightmost, the earlier letter in a tie.
    """
    text = _padded(response)
    for form in ("({})", " {} "):
        found = [letter for letter in index2option if form.format(letter) in text]
        if found:
            return _rightmost(found, [text.rfind(form.format(letter)) for letter in found])
    return _parse_content(text, index2option)


def parse_multi_choice_lmms_eval(response: str, index2option: Options) -> str | None:
    """As `parse_multi_choice` with lmms-eval's changes: "B " needs no space before it, and "B." is a form too.

    Source: lmms_eval/tasks/mmmu/utils.py at 75571cfe, where several found are still ranked by " B ".
    """
    text = _padded(response)
    for form, ranked in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in index2option if form.format(letter) in text]
        if found:
            return _rightmost(found, [text.rfind(ranked.format(letter)) for letter in found])
    return _parse_content(text, index2option)


def _padded(response: str) -> str:
    for character in STRIPPED:
        response = response.strip(character)
    return f" {response} "


def _parse_content(text: str, options: Options) -> str | None:
    lowered = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in lowered]
    if not found or len(text.split()) <= 5:
        return None
    return _rightmost(found, [lowered.rfind(options[letter].lower()) for letter in found])


def _rightmost(letters: Sequence[str], places: Sequence[int]) -> str:
    return letters[places.index(max(places))]  # the first of equals


def parse_open(response: str) -> list[str | float]:
    """The texts and numbers a response may mean, normalised and without repeats. Source: parse_open_response."""
    keys = _key_parts(response)
    numbers = [number for key in keys for pattern in NUMBERS for number in pattern.findall(key)]
    return list(dict.fromkeys(value for text in (*keys, *numbers) for value in normalise(text)))


def _key_parts(response: str) -> list[str]:
    """The ends of lines after words such as "answer is "; the whole response if there is none."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")  # the official split at sentences asks for a capital in lower-cased text: it never is
    ends = [_shortest_end(line, last=number == len(lines)) for number, line in enumerate(lines, start=1)]
    return [end for end in ends if end and end not in TRIVIAL] or [response]


def _shortest_end(line: str, last: bool) -> str:
    """The shortest of the ends after each indicator; an empty one gives way to whichever comes next, as officially."""
    shortest = ""
    for indicator in (*INDICATORS, "=") if last else INDICATORS:
        if indicator in line:
            end = line.rpartition(indicator)[2].strip()
            shortest = end if not shortest or len(end) < len(shortest) else shortest
    return shortest


def normalise(text: str) -> list[str | float]:
    """A number rounded to two decimals, else lower-case text; one character as two variants. Source: normalize_str."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def gold_texts(answer: str | Sequence[str]) -> tuple[str, ...]:
    """The right texts: the parquet files hold several as the repr of a list."""
    if not isinstance(answer, str):
        return tuple(answer)
    try:
        value = ast.literal_eval(answer)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return (answer,)
    return tuple(map(str, value)) if isinstance(value, list) and value else (answer,)


def is_correct_open(gold: str | Sequence[str], response: str) -> bool:
    """Whether a response to an open question is right: a number equals one, a text contains one. Source: eval_open."""
    right = [value for text in gold_texts(gold) for value in normalise(text)]
    return any(_matches(value, right) for value in parse_open(response))


def _matches(value: str | float, right: Sequence[str | float]) -> bool:
    if isinstance(value, str):
        return any(isinstance(gold, str) and gold in value for gold in right)
    return value in right
