"""Short answers by type: exact match after normalisation, accuracy overall and per category.

Run and score a model:
  python -m vlmpeft.eval.short model=DIR questions=FILE images=DIR out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.short questions=FILE answers=FILE
compare=DIR, the output folder of another run on the same questions, adds a paired test; ablate=blank, shuffle or noise
shows a blank picture, another question's picture or noise in place of the image.

questions: JSON lines with question_id, image, text, label, category. A category whose labels are all yes or no is
judged by the POPE parser; every other answer must equal its label once both are normalised: lower case, no surrounding
white space, no trailing punctuation, no articles (a, an, the) and one to ten as digits.
answers: JSON lines with question_id and text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import EvalError, run_command
from vlmpeft.eval.compare import compare_files
from vlmpeft.eval.interval import interval
from vlmpeft.eval.pope import DEFAULTS, OPTIONAL, REQUIRED, SUFFIX, is_unparsable, parse_answer
from vlmpeft.eval.rows import Row, answer_text, join, read_rows
from vlmpeft.eval.runner import Answerer, ask, parse_arguments, run, table

ABOUT = {"benchmark": "short", "parser": "exact match after normalisation; official POPE parser for yes/no"}
QUESTION_KEYS = ("question_id", "image", "text", "label", "category")
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS, start=1)}


def normalise(text: str) -> str:
    """Lower case, trailing punctuation and articles dropped, one..ten as digits, single spaces.

    An answer that consists of articles only keeps them: "A" may be the letter of an option.
    """
    words = text.lower().strip().rstrip(" \t\n.,;:!?").split()
    kept = [word for word in words if word not in ARTICLES] or words
    return " ".join(DIGITS.get(word, word) for word in kept)


def yes_no_categories(questions: Sequence[Row]) -> frozenset[str]:
    """The categories whose labels are all yes or no."""
    other = {q["category"] for q in questions if _label(q).lower() not in ("yes", "no")}
    return frozenset(q["category"] for q in questions) - other


def is_correct(question: Row, text: str, yes_no: Collection[str]) -> bool:
    """Whether `text` answers the question, whose category may be one of the `yes_no` ones."""
    if question["category"] in yes_no:
        return parse_answer(text) == _label(question).lower()
    return normalise(text) == normalise(_label(question))


def _judge(questions: Sequence[Row]) -> Callable[[Row, str], bool]:
    """`is_correct` with the yes/no categories of these questions."""
    yes_no = yes_no_categories(questions)
    return lambda question, text: is_correct(question, text, yes_no)


def score(questions: Sequence[Row], answers: Sequence[Row]) -> dict[str, Any]:
    """Join by id and score; no question at all gives accuracy 0.0.

    Args:
        questions: question_id, text, label and category each.
        answers: question_id and text (or answer) each.

    Returns:
        accuracy, accuracy_ci95 ([low, high]), correct, n, empty, unparsable (those, and of yes/no questions the texts
        without a word yes, no or not), by_chance (always 0), and `categories`: name to the first four.

    Raises:
        EvalError: V601 for missing, extra or repeated ids, V602 for a label or text of a wrong kind.
    """
    yes_no = yes_no_categories(questions)
    pairs = [(question, answer_text(answer)) for question, answer in join(questions, answers)]
    hits: dict[str, list[bool]] = {}
    for question, text in pairs:
        hits.setdefault(question["category"], []).append(is_correct(question, text, yes_no))
    return {
        **_accuracy([hit for category in hits.values() for hit in category]),
        "empty": sum(not text.strip() for _, text in pairs),
        "unparsable": sum(not text.strip() or (q["category"] in yes_no and is_unparsable(text)) for q, text in pairs),
        "by_chance": 0,
        "categories": {category: _accuracy(hits[category]) for category in sorted(hits)},
    }


def _accuracy(hits: Sequence[bool]) -> dict[str, Any]:
    accuracy = sum(hits) / len(hits) if hits else 0.0
    return {"accuracy": accuracy, "accuracy_ci95": interval(hits), "correct": sum(hits), "n": len(hits)}


def _label(question: Row) -> str:
    label = question.get("label")
    if not isinstance(label, str) or not label.strip():
        raise EvalError("V602", f"question {question.get('question_id')}: label must be text, got {label!r}.")
    return label.strip()


def evaluate(
    bundle: Answerer,
    questions: Sequence[Row],
    images: str | Path,
    *,
    suffix: str = SUFFIX,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    ablate: str = "none",
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask a model and score it. Returns: the answer rows in question order, and `score` of them."""
    judge = _judge(questions)
    answers = ask(
        bundle,
        questions,
        images,
        suffix=suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        ablate=ablate,
        progress=progress,
        correct=judge,
    )
    rows = [
        {key: value for key, value in row.items() if key != "margin"}
        | {key: question[key] for key in ("label", "category")}
        | {"correct": judge(question, row["text"])}
        for question, row in zip(questions, answers, strict=True)
    ]
    return rows, score(questions, rows)


def _print_table(metrics: Mapping[str, Any]) -> None:
    rows = [["category", "n", "correct", "accuracy"]]
    for name, m in [*metrics["categories"].items(), ("all", metrics)]:
        rows.append([name, str(m["n"]), str(m["correct"]), f"{m['accuracy']:.4f}"])
    print(table(rows))


def score_files(argv: Sequence[str]) -> None:
    """The command line with answers=FILE: scores as JSON on stdout; imports no torch."""
    arguments = parse_arguments(argv, OPTIONAL, ("questions", "answers"), __doc__ or "")
    questions, answers = read_rows(arguments["questions"], QUESTION_KEYS), read_rows(arguments["answers"])
    metrics = {**ABOUT, **score(questions, answers)}
    if arguments["compare"]:
        metrics["compare"] = compare_files(questions, answers, arguments["compare"], _judge(questions))
    print(json.dumps(metrics, ensure_ascii=False, indent=2))


def run_model(argv: Sequence[str]) -> None:
    """The command line with model=DIR: writes answers.jsonl and metrics.json into out, prints a table."""
    arguments = parse_arguments(argv, DEFAULTS | OPTIONAL, REQUIRED, __doc__ or "")
    questions = read_rows(arguments["questions"], QUESTION_KEYS)
    run(arguments, questions, evaluate, ABOUT, _judge(questions), _print_table)


def main(argv: Sequence[str]) -> None:
    """Score given answers, or run a model and score it."""
    given = any(argument.startswith("answers=") for argument in argv)
    (score_files if given else run_model)(argv)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
