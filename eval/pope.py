"""POPE (arXiv:2305.10355): is the object in the image, yes or no? Parser and metrics as in the official evaluate.py.

Run and score a model:
  python -m vlmpeft.eval.pope model=DIR questions=FILE[,FILE,FILE] images=DIR out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.pope questions=FILE[,FILE,FILE] answers=FILE
compare=DIR, the output folder of another run on the same questions, adds a paired test; ablate=blank, shuffle or noise
shows a blank picture, another question's picture or noise in place of the image.

questions: JSON lines with question_id, image, text, label (yes or no). Several files are several settings (random,
popular, adversarial); their ids repeat, so an answer is keyed by setting (the file's name without its ending) and id.
answers: JSON lines with question_id (and setting) and text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval.compare import compare_files
from vlmpeft.eval.interval import interval
from vlmpeft.eval.method import YES_NO
from vlmpeft.eval.rows import Row, answer_text, join, read_rows
from vlmpeft.eval.runner import Answerer, ask, parse_arguments, run, table

SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5 (arXiv:2310.03744) table 9
REVISION_2910 = "2910-row random (POPE up to e3e39262; 1500 yes, 1410 no); not comparable with the 3000-row file"
ABOUT = {"benchmark": "pope", "parser": "official"}  # POPE 08d957b evaluate.py, identical to LLaVA's eval_pope.py
QUESTION_KEYS = ("question_id", "image", "text", "label")
REQUIRED = ("model", "questions", "images", "out")
DEFAULTS = {"suffix": SUFFIX, "batch_size": 16, "ablate": "none", "max_new_tokens": 16, "device": "auto"}
DEFAULTS |= {"overwrite": False, "wrong": 60}
OPTIONAL = {"compare": None}
COLUMNS = ("n", "accuracy", "precision", "recall", "f1", "yes_ratio", "unparsable", "empty", "auc")


def parse_answer(text: str) -> Literal["yes", "no"]:
    """The official parser: "no" if a token before the first full stop is No, no or not; otherwise "yes", junk included.

    Source: POPE evaluate.py. Commas are deleted (not replaced) and only single spaces split, so "No,there" is "yes".
    """
    tokens = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(tokens) else "yes"


def is_unparsable(text: str) -> bool:
    """Whether neither yes nor no nor not is a word of it, in any case; the official parser counts it as yes."""
    return re.search(r"\b(yes|no|not)\b", text, re.IGNORECASE) is None


def is_correct(question: Row, text: str) -> bool:
    """Whether the parsed text is the question's label."""
    return parse_answer(text) == question["label"]


def score(questions: Sequence[Row], answers: Sequence[Row]) -> dict[str, Any]:
    """Join by id and score; the positive class is yes and a division by zero gives 0.0.

    Args:
        questions: question_id, image, text and label each; with `setting`, that is part of the key.
        answers: question_id and text (or answer) each; `margin` in every row adds `auc`.

    Returns:
        accuracy, accuracy_ci95 ([low, high]), precision, recall, f1, yes_ratio, tp, fp, tn, fn, n, empty, unparsable
        (empty ones included);
        where known also auc and revision.

    Raises:
        EvalError: V601 for missing, extra or repeated ids, V602 for a label, text or margin of a wrong kind.
    """
    return _metrics(join(questions, answers))


def score_settings(questions: Sequence[Row], answers: Sequence[Row]) -> dict[str, Any]:
    """As `score`; where every question has a `setting`: `settings` (name to metrics), the means over them, and n."""
    pairs = join(questions, answers)
    if not pairs or not all("setting" in question for question in questions):
        return _metrics(pairs)
    names = dict.fromkeys(str(question["setting"]) for question in questions)
    settings = {name: _metrics([p for p in pairs if str(p[0]["setting"]) == name]) for name in names}
    mean = {f"mean_{key}": sum(m[key] for m in settings.values()) / len(settings) for key in ("accuracy", "f1")}
    return {**mean, "n": len(pairs), "settings": settings}


def _metrics(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    labels = [_label(question) == "yes" for question, _ in pairs]
    texts = [answer_text(answer) for _, answer in pairs]
    predictions = [parse_answer(text) == "yes" for text in texts]
    outcomes = list(zip(labels, predictions, strict=True))
    tp, fp = outcomes.count((True, True)), outcomes.count((False, True))
    tn, fn = outcomes.count((False, False)), outcomes.count((True, False))
    metrics: dict[str, Any] = {
        "accuracy": _ratio(tp + tn, len(pairs)),
        "accuracy_ci95": interval([label == predicted for label, predicted in outcomes]),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),  # = 2PR / (P + R), and 0 instead of undefined at TP = 0
        "yes_ratio": _ratio(tp + fp, len(pairs)),
        **{"tp": tp, "fp": fp, "tn": tn, "fn": fn, "n": len(pairs)},
        "unparsable": sum(map(is_unparsable, texts)),
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


def _label(question: Row) -> str:
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
    method: str = "generate",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask a model and score it. Args: method: see `method.candidates_of`; the answers are Yes and No.

    Returns: the answer rows in question order, and `score_settings` of them.
    """
    for question in questions:
        _label(question)
    answers = ask(
        bundle,
        questions,
        images,
        suffix=suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        ablate=ablate,
        contrast=YES_NO,
        progress=progress,
        correct=is_correct,
        method=method,
        candidates=YES_NO,
    )
    rows = [
        {**row, "parsed": parse_answer(row["text"]), "label": question["label"], "margin": row["margin"]}
        for question, row in zip(questions, answers, strict=True)
    ]
    return rows, score_settings(questions, rows)


def read_questions(files: str) -> list[dict[str, Any]]:
    """Read comma-separated question files; of several, each row gets its file's name as `setting`.

    Rows of the 2910-row random file carry that as `revision`, which the metrics repeat.
    """
    paths = [Path(file) for file in files.split(",")]
    if len({path.stem for path in paths}) < len(paths):
        raise ConfigError("C102", f"questions={files}: two files share a name.", "rename one; the name is the setting.")
    questions: list[dict[str, Any]] = []
    for path in paths:
        rows = read_rows(path, QUESTION_KEYS)
        for row in rows:
            _label(row)
        setting = {"setting": path.stem} if len(paths) > 1 else {}
        revision = {"revision": REVISION_2910} if "random" in path.stem.lower() and len(rows) == 2910 else {}
        questions += [{**row, **setting, **revision} for row in rows]
    return questions


def _print_table(metrics: Mapping[str, Any]) -> None:
    settings = metrics.get("settings", {"all": metrics})
    columns = [c for c in COLUMNS if all(c in m for m in settings.values())]
    rows = [["setting", *columns]]
    for name, m in settings.items():
        rows.append([name, *(f"{m[c]:.4f}" if isinstance(m[c], float) else str(m[c]) for c in columns)])
    print(table(rows))
    if "settings" in metrics:
        print(f"mean accuracy {metrics['mean_accuracy']:.4f}, mean F1 {metrics['mean_f1']:.4f}")


def score_files(argv: Sequence[str]) -> None:
    """The command line with answers=FILE: scores as JSON on stdout; imports no torch."""
    arguments = parse_arguments(argv, OPTIONAL, ("questions", "answers"), __doc__ or "")
    questions, answers = read_questions(arguments["questions"]), read_rows(arguments["answers"])
    metrics = {**ABOUT, **score_settings(questions, answers)}
    if arguments["compare"]:
        metrics["compare"] = compare_files(questions, answers, arguments["compare"], is_correct)
    print(json.dumps(metrics, ensure_ascii=False, indent=2))


def run_model(argv: Sequence[str]) -> None:
    """The command line with model=DIR: writes answers.jsonl and metrics.json into out, prints a table."""
    arguments = parse_arguments(argv, DEFAULTS | OPTIONAL | {"method": "generate"}, REQUIRED, __doc__ or "")
    run(arguments, read_questions(arguments["questions"]), evaluate, ABOUT, is_correct, _print_table)


def main(argv: Sequence[str]) -> None:
    """Score given answers, or run a model and score it."""
    given = any(argument.startswith("answers=") for argument in argv)
    (score_files if given else run_model)(argv)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
