"""Multiple choice: items, letters, parsers, verdicts and their counts. No model and no torch.

A parser turns an answer and its options into a letter, or None if it finds none; a judge turns that into a verdict.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmpeft.errors import EvalError
from vlmpeft.eval.interval import interval
from vlmpeft.eval.rows import Row, join

LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA-1.5 (arXiv:2310.03744) table 9
REFUSALS = (  # VLMEvalKit matching_util.py: such an answer chooses nothing
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
Options = Mapping[str, str]  # letter to text, in order
Parser = Callable[[str, Options], str | None]
Predictions = Mapping[str, str] | Sequence[Row]


@dataclass(frozen=True)
class Item:
    """A question with its right answer.

    Args:
        options: empty for an open question.
        answer: the right letter, for an open question the right text or texts; None where the owner keeps it.
        prompt: what a model is asked; `<image>` stands for an image, all stand in front if it names none.
        images: files, or the bytes of such.
        groups: kind of group to name of group, for the breakdowns: {"subject": "Art"}.
    """

    id: str
    options: Options
    answer: str | tuple[str, ...] | None
    prompt: str = ""
    images: tuple[Path | bytes, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """parsed: letter or texts, None if the parser found nothing. correct: with chance's letter where `by_chance`."""

    parsed: str | list[str | float] | None
    correct: bool
    by_chance: bool = False
    empty: bool = False


Judge = Callable[[Item, str], Verdict]
Summary = Callable[[Sequence[Item], Sequence[Verdict]], dict[str, Any]]


def lettered(options: Sequence[object], item_id: str) -> dict[str, str]:
    """Options by the letters A to Z. Raises: EvalError V602 for fewer than two or more than 26."""
    if not 2 <= len(options) <= len(string.ascii_uppercase):
        raise EvalError("V602", f"question {item_id}: {len(options)} options; a choice has 2 to 26.")
    return dict(zip(string.ascii_uppercase, map(str, options), strict=False))


def option_lines(options: Options, form: str = "{}. {}") -> str:
    """One line an option: "A. cat"."""
    return "\n".join(form.format(letter, text) for letter, text in options.items())


def literal(text: str) -> str:
    r"""Text of a data set as part of a prompt: an `<image>` typed in it is no mark."""
    return text.replace("<image>", r"\<image>")


def judge_with(parser: Parser, chance: bool = False) -> Judge:
    """A judge that compares the parsed letter with the right one; `chance` draws a letter where none was found."""

    def judge(item: Item, text: str) -> Verdict:
        parsed = parser(text, item.options)
        chosen = chance_letter(item.id, item.options) if chance and parsed is None else parsed
        return Verdict(parsed, chosen is not None and chosen == item.answer, chance and parsed is None)

    return judge


def chance_letter(item_id: str, options: Options, seed: int = 42) -> str:
    """A uniform letter drawn from the id alone, so that no other item, order or process changes it."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed}:{item_id}".encode()).digest()[:8])
    return list(options)[drawn % len(options)]


def parse_strict(text: str, options: Options) -> str | None:
    """The letter that is the whole answer, alone, in brackets, or with a full stop, colon or bracket after it."""
    found = re.fullmatch(r"\(([A-Z])\)|([A-Z])[.:)]?", text.strip())
    letter = found and (found[1] or found[2])
    return letter if letter and letter in options else None


def parse_vlmevalkit(text: str, options: Options) -> str | None:
    """VLMEvalKit's rule without its judge model: the only letter, near the end; "answer is X"; the only option text.

    Source: vlmeval/utils/matching_util.py at e8e78f05, can_infer.
    """
    if any(refusal in text for refusal in REFUSALS):
        return None
    tokens = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in options if letter in tokens]
    if len(named) == 1 and tokens.index(named[0]) > len(tokens) - 5:
        return named[0]
    if not named and "Z" in tokens:
        return None
    said = re.search(r"answer\s+is\s+\**([ABCD])\**", text, re.IGNORECASE)
    if said and said[1].upper() in options:
        return said[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    contained = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return contained[0] if len(contained) == 1 else None


def score_items(
    items: Sequence[Item],
    predictions: Predictions,
    judge: Judge,
    summarise: Callable[[Sequence[Item], Sequence[Verdict]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Join by id, judge and count. Raises: EvalError V601 for missing, extra or repeated ids."""
    texts = [str(answer["text"]) for _, answer in join(keyed(items), answer_rows(predictions))]
    return (summarise or tally)(items, verdicts_of(items, texts, judge))


def verdicts_of(items: Sequence[Item], texts: Sequence[str], judge: Judge) -> list[Verdict]:
    """A verdict an item, `empty` filled in."""
    pairs = zip(items, texts, strict=True)
    return [replace(judge(item, text), empty=not text.strip()) for item, text in pairs]


def refuse_repeated(items: Sequence[Item]) -> None:
    """Raises: EvalError V601 for repeated ids, as `score_items` would after all questions were asked."""
    join(keyed(items), [{"question_id": item_id} for item_id in dict.fromkeys(item.id for item in items)])


def keyed(items: Sequence[Item]) -> list[dict[str, str]]:
    """The items as questions to join by."""
    return [{"question_id": item.id} for item in items]


def answer_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """Rows with question_id and text, from {id: text} or rows with id or question_id, text, response or answer."""
    if isinstance(predictions, Mapping):
        predictions = [{"question_id": key, "text": text} for key, text in predictions.items()]
    rows = []
    for number, row in enumerate(predictions, start=1):
        if "options" in row:
            message = f"row {number} of the answers has options: these are the questions."
            raise EvalError("V601", message, "give the file that a model answered.")
        keys = [key for key in ("question_id", "id") if key in row]
        text = next((row[key] for key in ("text", "response", "answer") if key in row), None)
        if not isinstance(text, str):
            name = row[keys[0]] if keys else f"in row {number}"
            raise EvalError("V602", f"the answer {name} has no text, but {text!r:.80}.", "give it as `text`.")
        rows.append({**({"question_id": row[keys[0]]} if keys else {}), "text": text})
    return rows


def tally(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Accuracy over all items and by group, and how it came about.

    Returns:
        accuracy (chance included), accuracy_ci95, correct, n, unparsable, by_chance, accuracy_without_chance, empty,
        and for each kind of group a mapping of name to accuracy, accuracy_ci95, correct, n. Where all answers are
        hidden only the counts.

    Raises:
        EvalError: V602 if some right answers are hidden and some are not.
    """
    counts = {
        "unparsable": sum(v.parsed is None for v in verdicts),
        "by_chance": sum(v.by_chance for v in verdicts),
        "empty": sum(v.empty for v in verdicts),
    }
    hidden = [item.id for item in items if item.answer is None]
    if hidden and len(hidden) == len(items):
        return {"n": len(items), "answers": "hidden", **counts}
    if hidden:
        raise EvalError("V602", f"{len(hidden)} of {len(items)} items have no right answer; the first is {hidden[0]}.")
    sure = sum(v.correct and not v.by_chance for v in verdicts)
    without = {"accuracy_without_chance": sure / len(items) if items else 0.0}
    kinds = dict.fromkeys(kind for item in items for kind in item.groups)
    groups = {kind: _by_group(kind, items, verdicts) for kind in kinds}
    return {**accuracy([v.correct for v in verdicts]), **counts, **without, **groups}


def _by_group(kind: str, items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    sizes = Counter(item.groups.get(kind, "") for item in items)
    hits = {name: [v.correct for i, v in zip(items, verdicts, strict=True) if i.groups.get(kind, "") == name]
            for name in sorted(sizes)}  # fmt: skip
    return {name: accuracy(values) for name, values in hits.items()}


def accuracy(hits: Sequence[bool]) -> dict[str, Any]:
    """accuracy with its 95 % bootstrap interval, correct, n; of nothing 0.0."""
    mean = sum(hits) / len(hits) if hits else 0.0
    return {"accuracy": mean, "accuracy_ci95": interval(hits), "correct": sum(hits), "n": len(hits)}
