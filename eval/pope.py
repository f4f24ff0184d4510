"""POPE (arXiv:2305.10355): is the object in the image, yes or no? Parser and metrics as in the official evaluate.py.

Run and score a model:
  python -m vlmpeft.eval.pope model=DIR questions=FILE[,FILE,FILE] images=DIR out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.pope questions=FILE[,FILE,FILE] answers=FILE
compare=DIR, the output folder of another run on the same questions, adds a paired test; ablate=blank, shuffle or noise
shows a blank picture, another question's picture or noise in place of the image.

parser: official (the original's: junk is yes), lmms-eval, vlmevalkit, or strict; figures differ by parser.

questions: JSON lines with question_id, image, text, label (yes or no). Several files are several settings (random,
popular, adversarial); their ids repeat, so an answer is keyed by setting (the file's name without its ending) and id.
One file may hold all settings, each row's as `category`, several with commas between: it then counts in each.
answers: JSON lines with question_id (and setting) and text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlmpeft.errors import run_command
from vlmpeft.eval.compare import compare_files
from vlmpeft.eval.method import YES_NO
from vlmpeft.eval.pope_parse import PARSERS, is_unparsable, parse_answer, parser_of
from vlmpeft.eval.pope_questions import read_questions, refuse_other_setting
from vlmpeft.eval.pope_score import auc, is_correct, label_of, score, score_settings
from vlmpeft.eval.rows import Row, read_rows
from vlmpeft.eval.runner import Answerer, ask, parse_arguments, run, table

__all__ = ["PARSERS", "auc", "evaluate", "is_correct", "is_unparsable", "main", "parse_answer", "read_questions"]
__all__ += ["score", "score_settings"]
SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5 (arXiv:2310.03744) table 9
REQUIRED = ("model", "questions", "images", "out")
DEFAULTS = {"suffix": SUFFIX, "batch_size": 16, "ablate": "none", "max_new_tokens": 16, "device": "auto"}
DEFAULTS |= {"overwrite": False, "wrong": 60}
OPTIONAL = {"compare": None}
OWN = {"parser": "official"}
COLUMNS = ("n", "accuracy", "precision", "recall", "f1", "yes_ratio", "unparsable", "empty", "auc")


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
    parser: str = "official",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask a model and score it.

    Args:
        method: see `method.candidates_of`; the answers are Yes and No.
        parser: one of PARSERS.

    Returns: the answer rows in question order, and `score_settings` of them.
    """
    parse = parser_of(parser)
    for question in questions:
        label_of(question)
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
        correct=partial(is_correct, parser=parser),
        method=method,
        candidates=YES_NO,
    )
    rows = [
        {**row, "parsed": parse(row["text"]), "label": question["label"], "margin": row["margin"]}
        for question, row in zip(questions, answers, strict=True)
    ]
    return rows, score_settings(questions, rows, parser=parser)


def _print_table(metrics: Mapping[str, Any]) -> None:
    settings = metrics.get("settings", {"all": metrics})
    columns = [c for c in COLUMNS if all(c in m for m in settings.values())]
    rows = [["setting", *columns]]
    for name, m in settings.items():
        rows.append([name, *(f"{m[c]:.4f}" if isinstance(m[c], float) else str(m[c]) for c in columns)])
    print(table(rows))
    if "settings" in metrics:
        print(f"mean accuracy {metrics['mean_accuracy']:.4f}, mean F1 {metrics['mean_f1']:.4f}")


def _about(parser: str) -> dict[str, str]:
    parser_of(parser)
    return {"benchmark": "pope", "parser": parser}


def score_files(argv: Sequence[str]) -> None:
    """The command line with answers=FILE: scores as JSON on stdout; imports no torch."""
    arguments = parse_arguments(argv, OPTIONAL | OWN, ("questions", "answers"), __doc__ or "")
    parser = arguments["parser"]
    about = _about(parser)
    questions, answers = read_questions(arguments["questions"]), read_rows(arguments["answers"])
    refuse_other_setting(arguments["questions"], answers)
    metrics = {**about, **score_settings(questions, answers, parser=parser)}
    if arguments["compare"]:
        judge = partial(is_correct, parser=parser)
        metrics["compare"] = compare_files(questions, answers, arguments["compare"], judge)
    print(json.dumps(metrics, ensure_ascii=False, indent=2))


def run_model(argv: Sequence[str]) -> None:
    """The command line with model=DIR: writes its results into out, prints a table."""
    arguments = parse_arguments(argv, DEFAULTS | OPTIONAL | OWN | {"method": "generate"}, REQUIRED, __doc__ or "")
    parser = arguments["parser"]
    judge, asking = partial(is_correct, parser=parser), partial(evaluate, parser=parser)
    run(arguments, read_questions(arguments["questions"]), asking, _about(parser), judge, _print_table)


def main(argv: Sequence[str]) -> None:
    """Score given answers, or run a model and score it."""
    given = any(argument.startswith("answers=") for argument in argv)
    (score_files if given else run_model)(argv)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
