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
    return _metrics(join(questions, answers), parser)


def score_settings(questions: Sequence[Row], answers: Sequence[Row], *, parser: str = "official") -> dict[str, Any]:
    """As `score`; where every question has a `setting`: `settings` (name to metrics), two totals of them, and n.

    The totals are `mean_` (LLaVA's: the mean over settings) and `pooled_` (the harnesses': over all answers) accuracy
    and f1.
    """
    pairs = join(questions, answers)
    if not pairs or not all("setting" in question for question in questions):
        return _metrics(pairs, parser)
    names = dict.fromkeys(str(question["setting"]) for question in questions)
    settings = {name: _metrics([p for p in pairs if str(p[0]["setting"]) == name], parser) for name in names}
    mean = {f"mean_{key}": sum(m[key] for m in settings.values()) / len(settings) for key in ("accuracy", "f1")}
    whole = _metrics(pairs, parser)
    pooled = {f"pooled_{key}": whole[key] for key in ("accuracy", "f1")}
    counts = {key: whole[key] for key in ("n", "unparsable", "by_chance", "empty")}
    return {**mean, **pooled, **counts, "settings": settings}


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
        raise EvalError("V602", f"{place}: label must be 'yes' or 'no', got {question.get('label')!r}.")
    return str(question["label"])


def _margin(answer: Row) -> float | None:
    margin = answer.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or math.isnan(margin):
        raise EvalError("V602", f"answer {answer.get('question_id')}: margin must be a number, got {margin!r}.")
    return float(margin)
