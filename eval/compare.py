"""Two runs on the same questions: is one better, or is it chance? McNemar's exact test on paired answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import EvalError
from vlmpeft.eval.rows import Row, answer_text, join, read_rows


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p value that `wins` and `losses` of the questions on which two runs differ are a fair coin's.

    min(1, 2 P(X <= min(wins, losses))) with X ~ Binomial(wins + losses, 1/2); 1 where the runs never differ.
    Source: McNemar, Psychometrika 12, 1947; the exact form as in Edwards, Psychometrika 13, 1948.
    """
    n, ways, below = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        below += ways
        ways = ways * (n - k) // (k + 1)  # the next binomial coefficient, exactly
    return min(1.0, math.exp(math.log(2 * below) - n * math.log(2)))


def texts_of(folder: str | Path, questions: Sequence[Row]) -> list[str]:
    """What another run, whose output `folder` this is, answered to each question, in their order.

    Raises: ConfigError C102 without answers.jsonl; EvalError V601 if it answers other questions.
    """
    path = Path(folder) / "answers.jsonl"
    given = read_rows(path)
    try:
        return [answer_text(answer) for _, answer in join(questions, given)]
    except EvalError as error:
        fix = "compare with a run on the same questions."
        raise EvalError(error.code, f"{path}: {error.message}", fix) from error


def compare_files(
    questions: Sequence[Row], answers: Sequence[Row], folder: str | Path, correct: Callable[[Row, str], float]
) -> dict[str, Any]:
    """`compared` of given answers with those in `folder`, which it names as `with`. Raises: as `texts_of`."""
    ours = [answer_text(answer) for _, answer in join(questions, answers)]
    return {"with": str(folder), **compared(questions, ours, texts_of(folder, questions), correct)}


def compared(
    questions: Sequence[Row], ours: Sequence[str], theirs: Sequence[str], correct: Callable[[Row, str], float]
) -> dict[str, Any]:
    """Compare two texts for each question; `correct` gives (question, text) its score, from 0 to 1.

    Returns:
        accuracy (theirs), difference (ours minus theirs), better, worse and equal (numbers of questions), p_value: of
        McNemar's test; where answers are graded, of the sign test, the same formula on which of the two is higher.
    """
    right = [correct(question, text) for question, text in zip(questions, ours, strict=True)]
    other = [correct(question, text) for question, text in zip(questions, theirs, strict=True)]
    better = sum(a > b for a, b in zip(right, other, strict=True))
    worse = sum(a < b for a, b in zip(right, other, strict=True))
    n = max(1, len(questions))
    return {
        "accuracy": sum(other) / n,
        "difference": (sum(right) - sum(other)) / n,
        **{"better": better, "worse": worse, "equal": len(right) - better - worse},
        "p_value": mcnemar(better, worse),
    }
