"""POPE's metrics: of one file, of the settings together, and the area under the curve. No model and no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from vlmpeft.errors import EvalError
from vlmpeft.eval.interval import interval
from vlmpeft.eval.pope_parse import is_unparsable, parser_of
from vlmpeft.eval.rows import Row, answer_text, join

SETTINGS = frozenset({"random", "popular", "adversarial"})
REVISIONS = {  # of the random file, by its rows
    2910: "2910-row random (POPE up to e3e39262; 1500 yes, 1410 no); not comparable with the 3000-row file",
    3000: "3000-row random (POPE after e3e39262; 1500 yes, 1500 no)",
}


def is_correct(question: Row, text: str, parser: str = "official") -> bool:
    """Whether the parsed text is the question's label."""
    return parser_of(parser)(text) == question["label"]


def score(questions: Sequence[Row], answers: Sequence[Row], *, parser: str = "official") -> dict[str, Any]:
    """Join by id and score; the positive class is yes and a division by zero gives 0.0.

    Args:
        questions: question_id, image, text and label each; with `setting`, that is part of the key.
        answers: question_id and text (or answer) each; `margin` in every row adds `auc`.
        parser: one of PARSERS. What it cannot read is wrong; precision and recall take it for no, but for lmms-eval,
            whose recall leaves it out.

    Returns:
        accuracy, accuracy_ci95 ([low, high]), precision, recall, f1, yes_ratio (of the predictions), tp, fp, tn, fn
        (answers that were read), n, empty, unparsable (empty ones included), by_chance (always 0); where known also
        auc and revision.

    Raises:
        ConfigError: C102 for an unknown parser.
        EvalError: V601 for missing, extra or repeated ids, V602 for a label, text or margin of a wrong kind.
    """
    return _metrics(_joined(questions, answers), parser)


def score_settings(questions: Sequence[Row], answers: Sequence[Row], *, parser: str = "official") -> dict[str, Any]:
    """As `score`; where every question has settings: `settings` (name to metrics), two totals of them, and n.

    The totals are `mean_` (LLaVA's: the mean over settings) and `pooled_` (the harnesses': over all answers) accuracy
    and f1. A question of several settings counts once in each, in the totals and n as well: VLMEvalKit's Overall is
    pooled_f1.
    """
    pairs = [(name, pair) for pair in _joined(questions, answers) for name in settings_of(pair[0]) or ("",)]
    if not pairs or not all(name for name, _ in pairs):
        return _metrics([pair for _, pair in pairs], parser)
    names = dict.fromkeys(name for name, _ in pairs)
    settings = {name: _metrics([pair for of, pair in pairs if of == name], parser) for name in names}
    mean = {f"mean_{key}": sum(m[key] for m in settings.values()) / len(settings) for key in ("accuracy", "f1")}
    whole = _metrics([pair for _, pair in pairs], parser)
    pooled = {f"pooled_{key}": whole[key] for key in ("accuracy", "f1")}
    counts = {key: whole[key] for key in ("n", "unparsable", "by_chance", "empty")}
    return {**mean, **pooled, **counts, "settings": settings}


def settings_of(question: Row) -> tuple[str, ...]:
    """The file it is from; else its `category` where all of that, with commas between, are settings of POPE's."""
    if "setting" in question:
        return (str(question["setting"]),)
    names = tuple(dict.fromkeys(name.strip() for name in str(question.get("category", "")).split(",")))
    return names if SETTINGS.issuperset(names) else ()


def _joined(questions: Sequence[Row], answers: Sequence[Row]) -> list[tuple[Row, Row]]:
    """As `join`, but names the revision where there are as many answers as the other one of `random` has rows."""
    try:
        return join(questions, answers)
    except EvalError as error:
        found = {question.get("revision") for question in questions}
        asked = next((rows for rows, name in REVISIONS.items() if name in found), 0)
        given = asked + len(answers) - len(questions)
        if given == asked or not {given, asked}.issubset(REVISIONS):
            raise
        message = f"the answers are to the {given}-row revision of random, the questions of the {asked}-row one. "
        fix = f"score them against the file of {given} rows; figures of the two are not comparable."
        raise EvalError(error.code, message + error.message, fix) from error


def _metrics(pairs: Sequence[tuple[Row, Row]], parser: str) -> dict[str, Any]:
    parse = parser_of(parser)
    labels = [label_of(question) == "yes" for question, _ in pairs]
    texts = [answer_text(answer) for _, answer in pairs]
    outcomes = list(zip(labels, map(parse, texts), strict=True))
    tp, fp = outcomes.count((True, "yes")), outcomes.count((False, "yes"))
    tn, fn = outcomes.count((False, "no")), outcomes.count((True, "no"))
    missed = fn if parser == "lmms-eval" else labels.count(True) - tp
    metrics: dict[str, Any] = {
        "accuracy": _ratio(tp + tn, len(pairs)),
        "accuracy_ci95": interval([predicted == ("yes" if label else "no") for label, predicted in outcomes]),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + missed),
        "f1": _ratio(2 * tp, 2 * tp + fp + missed),  # = 2PR / (P + R), and 0 instead of undefined at TP = 0
        "yes_ratio": _ratio(tp + fp, len(pairs)),
        **{"tp": tp, "fp": fp, "tn": tn, "fn": fn, "n": len(pairs)},
        "unparsable": sum(is_unparsable(text, parser) for text in texts),
        "by_chance": 0,
        "empty": sum(not text.strip() for text in texts),
    }
    if pairs and "revision" in pairs[0][0]:
        metrics["revision"] = pairs[0][0]["revision"]
    margins = [_margin(answer) for _, answer in pairs]
    if pairs and None not in margins:
        metrics["auc"] = auc([m for m in margins if m is not None], labels)
    return metrics


def auc(margins: Sequence[float], labels: Sequence[bool]) -> float:
    """Probability that a yes question has a larger margin than a no question, ties counted half; O(n log n)."""
    wins, negatives = 0.0, 0
    for _, group in groupby(sorted(zip(margins, labels, strict=True)), key=lambda pair: pair[0]):
        tied = [label for _, label in group]
        wins += sum(tied) * (negatives + (len(tied) - sum(tied)) / 2)
        negatives += len(tied) - sum(tied)
    return _ratio(wins, negatives * (len(labels) - negatives))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def label_of(question: Row) -> str:
    """yes or no. Raises: EvalError V602 for another label."""
    if question.get("label") not in ("yes", "no"):
        place = f"question {question.get('question_id')}"
        message = f"{place}: label must be 'yes' or 'no', got {question.get('label')!r}."
        raise EvalError("V602", message, "write yes or no, in lower case.")
    return str(question["label"])


def _margin(answer: Row) -> float | None:
    margin = answer.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or math.isnan(margin):
        raise EvalError("V602", f"answer {answer.get('question_id')}: margin must be a number, got {margin!r}.")
    return float(margin)
