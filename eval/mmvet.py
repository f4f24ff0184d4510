"""MM-Vet (arXiv:2308.02490): open answers for a judge. This writes the official answer file and adds up given grades.

Run a model:
  python -m vlmpeft.eval.mmvet model=DIR questions=mm-vet.json images=DIR out=DIR [key=value ...]
Write the official file from answers:
  python -m vlmpeft.eval.mmvet questions=mm-vet.json answers=FILE results=FILE.json
Add up the grades the official evaluator wrote:
  python -m vlmpeft.eval.mmvet questions=mm-vet.json grades=FILE.json

questions: the official JSON object, id to imagename, question, capability (a list). out gets answers.jsonl and
results.json, id to text, which the official evaluator takes. grades: id to an object with `score`, a list of numbers
from 0 to 1, one for each run of the judge.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from vlmpeft.errors import EvalError, run_command
from vlmpeft.eval.interval import interval
from vlmpeft.eval.pope import DEFAULTS, REQUIRED
from vlmpeft.eval.rows import Row, answer_text, join, read_document, read_rows, write_json
from vlmpeft.eval.runner import Answerer, ask, parse_arguments, run

ABOUT = {"benchmark": "mm-vet", "parser": "none; a judge grades the texts"}


def official_results(questions: Sequence[Row], answers: Sequence[Row]) -> dict[str, str]:
    """Id to text, ids as `v1_N`. Raises: EvalError V601 for missing, extra or repeated ids."""
    return {_official_id(question["question_id"]): answer_text(answer) for question, answer in join(questions, answers)}


def _official_id(number: object) -> str:
    return str(number) if str(number).startswith("v1_") else f"v1_{number}"


def score(questions: Sequence[Row], grades: Mapping[str, Any]) -> dict[str, Any]:
    """Add up a judge's grades.

    Args:
        questions: question_id and capability (a list of names) each.
        grades: official id to an object with `score`, a list of as many numbers from 0 to 1 for each id.

    Returns:
        total (100 times the mean), total_ci95, std over the judge's runs, runs, n, capabilities and combinations (of
        capabilities): name to total and n.

    Raises:
        EvalError: V601 for missing or extra ids, V602 for grades of a wrong kind or an unequal number of runs.
    """
    rows = [{"question_id": number, **_grade(number, grade)} for number, grade in grades.items()]
    pairs = join([{"question_id": _official_id(question["question_id"])} for question in questions], rows)
    runs = {len(row["score"]) for _, row in pairs}
    if len(runs) > 1:
        raise EvalError("V602", f"the grades have {sorted(runs)} runs.", "grade every answer as often as the others.")
    means = [statistics.fmean(row["score"]) for _, row in pairs]
    of_runs = [statistics.fmean(run) for run in zip(*(row["score"] for _, row in pairs), strict=True)]
    names = [sorted(set(_capability(question))) for question in questions]
    single = sorted({name for group in names for name in group})
    combined = sorted({"+".join(group) for group in names})
    return {
        **_total(means),
        "total_ci95": [100 * bound for bound in interval(means)],
        "std": 100 * statistics.pstdev(of_runs) if of_runs else 0.0,
        "runs": runs.pop() if runs else 0,
        "capabilities": {c: _total(list(compress(means, (c in group for group in names)))) for c in single},
        "combinations": {c: _total(list(compress(means, ("+".join(group) == c for group in names)))) for c in combined},
    }


def _total(means: Sequence[float]) -> dict[str, Any]:
    return {"total": 100 * statistics.fmean(means) if means else 0.0, "n": len(means)}


def _grade(number: str, grade: Any) -> dict[str, Any]:
    scores = grade.get("score") if isinstance(grade, dict) else None
    if not isinstance(scores, list) or not scores or not all(map(_is_share, scores)):
        raise EvalError("V602", f"grade {number}: score must be a list of numbers from 0 to 1, got {scores!r:.80}.")
    return {"score": scores}


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _capability(question: Row) -> list[str]:
    names = question.get("capability")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        place = f"question {question.get('question_id')}"
        raise EvalError("V602", f"{place}: capability must be a list of names, got {names!r:.80}.")
    return names


def evaluate(
    bundle: Answerer,
    questions: Sequence[Row],
    images: str | Path,
    *,
    suffix: str = "",
    batch_size: int = 16,
    max_new_tokens: int = 1024,
    ablate: str = "none",
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask a model. Returns: the answer rows in question order, and how many there are and are empty."""
    answers = ask(
        bundle,
        questions,
        images,
        suffix=suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        ablate=ablate,
        progress=progress,
    )
    rows = [{key: value for key, value in row.items() if key != "margin"} for row in answers]
    return rows, {"n": len(rows), "empty": sum(not row["text"] for row in rows)}


def read_questions(path: str) -> list[dict[str, Any]]:
    """The official object as questions. Raises: EvalError V602 if it is of another layout."""
    objects = read_document(path)
    try:
        return [
            {"question_id": number, "image": q["imagename"], "text": q["question"], "capability": q["capability"]}
            for number, q in objects.items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        lack = f", {error} is missing" if isinstance(error, KeyError) else ""
        raise EvalError("V602", f"{path}: not the official layout{lack}.", "give mm-vet.json.") from error


def _read_grades(path: str) -> dict[str, Any]:
    grades = read_document(path)
    if not isinstance(grades, dict):
        raise EvalError("V602", f"{path}: expected an object, id to grade.", "give the official grade file.")
    return grades


def main(argv: Sequence[str]) -> None:
    """Add up given grades, write the official file from answers, or run a model."""
    given = {argument.partition("=")[0] for argument in argv}
    if "grades" in given:
        arguments = parse_arguments(argv, {}, ("questions", "grades"), __doc__ or "")
        metrics = score(read_questions(arguments["questions"]), _read_grades(arguments["grades"]))
        print(json.dumps({**ABOUT, **metrics}, indent=2))
    elif "answers" in given:
        arguments = parse_arguments(argv, {}, ("questions", "answers", "results"), __doc__ or "")
        questions, answers = read_questions(arguments["questions"]), read_rows(arguments["answers"])
        write_json(Path(arguments["results"]), official_results(questions, answers))
    else:
        arguments = parse_arguments(argv, {**DEFAULTS, "suffix": "", "max_new_tokens": 1024}, REQUIRED, __doc__ or "")
        questions = read_questions(arguments["questions"])
        out = Path(arguments["out"])

        def export(metrics: Mapping[str, Any]) -> None:
            write_json(out / "results.json", official_results(questions, read_rows(out / "answers.jsonl")))

        run(arguments, questions, evaluate, ABOUT, show=export)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
