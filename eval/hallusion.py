"""HallusionBench (arXiv:2310.14566): is every question about a figure, and every form of a question, answered right?

Run and score a model:
  python -m vlmpeft.eval.hallusion model=DIR questions=HallusionBench.json images=DIR out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.hallusion questions=HallusionBench.json answers=FILE [parser=contains]
Add up given judgements:
  python -m vlmpeft.eval.hallusion questions=HallusionBench.json judgements=FILE

questions: the official JSON list. An id is CATEGORY/SUBCATEGORY/SET/FIGURE/QUESTION, for example VD/chart/0/1/0.
answers: JSON lines with question_id and text.
judgements: JSON lines with question_id and correctness: 1 (correct), 0 (incorrect) or 2 (unclear), as the official
GPT-4 judge gives them.
parser: contains (yes if the text contains it, else no: lmms-eval's offline rule) or vlmevalkit (the word yes
or no, not both; else wrong; questions with an image alone, groups without the category) or strict (the word alone).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, nearest, run_command
from vlmpeft.eval.benchmark import Benchmark, Command, Pair, accuracy
from vlmpeft.eval.method import YES_NO
from vlmpeft.eval.pope_parse import parser_of
from vlmpeft.eval.rows import Row, join, read_document, read_rows
from vlmpeft.eval.runner import parse_arguments

QUESTION_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer")
PARSERS = ("contains", "vlmevalkit", "strict")
FOLDER = "hallusion_bench"  # of the images in the owners' archive
OPTIONS = {"parser": "contains"}
YES_OR_NO = re.compile("yes|no", re.IGNORECASE)
FIGURE = ("category", "subcategory", "set_id", "figure_id")
QUESTION = ("category", "subcategory", "set_id", "number")


def parse_answer(text: str, parser: str = "contains") -> str:
    """yes, no or, but by contains, unknown."""
    if parser == "contains":
        return "yes" if "yes" in text.lower() else "no"
    return parser_of(parser)(text) or "unknown"


def score(questions: Sequence[Row], answers: Sequence[Row], *, parser: str = "contains") -> dict[str, Any]:
    """Join by id, parse and score.

    Returns:
        aAcc, qAcc, fAcc (shares of answers, questions in all their forms, and figures that are all right), their mean,
        aAcc_ci95, n, questions, figures, easy and hard (qAcc of unedited and of edited figures), unparsable (texts
        without yes and no; by the others all that is not read), by_chance (always 0).

    Raises:
        EvalError: V601 for missing, extra or repeated ids.
    """
    return benchmark({"parser": parser}).score(questions, answers)


def score_judgements(questions: Sequence[Row], judgements: Sequence[Row]) -> dict[str, Any]:
    """Join by id and add up a judge's `correctness`, as the official evaluation.py does. Returns: as `score`.

    Raises:
        EvalError: V601 for missing, extra or repeated ids, V602 for a correctness other than 0, 1 and 2.
    """
    return _totals(questions, [_judged(*pair) for pair in join(questions, judgements)], official=True)


def benchmark(options: Mapping[str, Any]) -> Benchmark:
    """The benchmark with this `parser`. Raises: ConfigError C102 for an unknown one."""
    parser = str(options["parser"])
    if parser not in PARSERS:
        raise ConfigError("C102", f"no parser '{parser}'{nearest(parser, PARSERS)}")

    def judge(question: Row, text: str) -> dict[str, Any]:
        parsed = parse_answer(text, parser)
        return {"label": question["label"], "parsed": parsed, "score": float(parsed == question["label"])}

    def total(pairs: Sequence[Pair]) -> dict[str, Any]:
        theirs = parser == "vlmevalkit"
        kept = [pair for pair in pairs if not (theirs and pair[0]["text_only"])]
        right = [judge(question, text)["score"] == 1 for question, text in kept]
        unread = sum(parse_answer(text, parser) == "unknown" or not YES_OR_NO.search(text) for _, text in kept)
        counts = {"unparsable": unread, "by_chance": 0}
        return {**_totals([question for question, _ in kept], right, official=not theirs), **counts}

    return Benchmark({"benchmark": "hallusion", "parser": parser}, judge, total, candidates=YES_NO)


def _judged(question: Row, answer: Row) -> bool:
    """A judge's verdict; unclear is right where the figure is left out: nothing can be known without it."""
    code = str(answer.get("correctness"))
    if code not in ("0", "1", "2"):
        place = f"answer {answer.get('question_id')}"
        raise EvalError("V602", f"{place}: correctness must be 0, 1 or 2, got {answer.get('correctness')!r}.")
    return code == "1" or (code == "2" and _without_figure(question))


def _without_figure(question: Row) -> bool:
    return question["category"] == "VS" and question["figure_id"] == "0"


def _totals(questions: Sequence[Row], right: Sequence[bool], official: bool) -> dict[str, Any]:
    """The three accuracies. VLMEvalKit's groups leave the category out, so that VD/ocr and VS/ocr merge."""
    start = 0 if official else 1
    pairs = list(zip(questions, right, strict=True))
    by_question = _all_right(pairs, QUESTION[start:], lambda q: True)
    by_figure = _all_right(pairs, FIGURE[start:], lambda q: not _without_figure(q))
    easy = _all_right(pairs, QUESTION[start:], lambda q: q["visual_input"] != "2")
    hard = _all_right(pairs, QUESTION[start:], lambda q: q["visual_input"] == "2")
    answers = accuracy([float(r) for r in right])
    shares = {"aAcc": answers["accuracy"], "qAcc": _mean(by_question), "fAcc": _mean(by_figure)}
    return {
        **shares,
        "mean": sum(shares.values()) / len(shares),
        "aAcc_ci95": answers["accuracy_ci95"],
        **{"n": len(right), "questions": len(by_question), "figures": len(by_figure)},
        **{"easy": _mean(easy), "hard": _mean(hard)},
    }


def _all_right(pairs: Sequence[tuple[Row, bool]], fields: Sequence[str], counts: Callable[[Row], bool]) -> list[bool]:
    """Whether all answers of a group are right, for each group of equal `fields` among the questions that count."""
    groups: dict[tuple[str, ...], bool] = {}
    for question, right in pairs:
        if counts(question):
            key = tuple(question[field] for field in fields)
            groups[key] = groups.get(key, True) and right
    return list(groups.values())


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def read_questions(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The official list as questions. Raises: EvalError V602 for a row without what it needs."""
    path = arguments["questions"]
    rows = read_document(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EvalError("V602", f"{path}: expected a list of objects.", "give the official HallusionBench.json.")
    images = arguments.get("images")
    inside = images is not None and not (Path(images) / FOLDER).is_dir()
    return [_question(row, f"{path} row {number}", inside) for number, row in enumerate(rows, start=1)]


def _question(row: Row, place: str, inside: bool) -> dict[str, Any]:
    """A row as a question. Args: inside: whether its image is looked for below FOLDER, which all names begin with."""
    absent = next((key for key in QUESTION_KEYS if key not in row), None)
    if absent:
        fix = "give the official HallusionBench.json."
        raise EvalError("V602", f"{place}: no key '{absent}'{nearest(absent, row)}.", fix)
    if str(row["gt_answer"]) not in ("0", "1"):
        raise EvalError("V602", f"{place}: gt_answer must be 0 or 1, got {row['gt_answer']!r}.")
    fields = {key: str(row[key]) for key in FIGURE} | {"number": str(row["question_id"])}
    name, text_only = str(row.get("filename") or ""), str(row.get("visual_input")) == "0"
    return {
        **fields,
        "question_id": "/".join(fields.values()),
        "text": str(row["question"]),
        "label": "yes" if str(row["gt_answer"]) == "1" else "no",
        "visual_input": str(row.get("visual_input")),
        "text_only": text_only,
        **({} if text_only else {"image": name.removeprefix("./").removeprefix(FOLDER + "/" if inside else "")}),
    }


def _table(metrics: Mapping[str, Any]) -> list[list[str]]:
    names = ("aAcc", "qAcc", "fAcc", "mean", "easy", "hard")
    return [["measure", "value"], *([name, f"{metrics[name]:.4f}"] for name in names)]


COMMAND = Command(__doc__ or "", read_questions, benchmark, _table, OPTIONS)


def main(argv: Sequence[str]) -> None:
    """Score given answers or judgements, or run a model and score it."""
    if not any(argument.startswith("judgements=") for argument in argv):
        COMMAND.main(argv)
        return
    arguments = parse_arguments(argv, {}, ("questions", "judgements"), __doc__ or "")
    metrics = score_judgements(read_questions(arguments), read_rows(arguments["judgements"]))
    print(json.dumps({"benchmark": "hallusion", "parser": "given judgements", **metrics}, indent=2))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
