"""A benchmark in one file: say how an answer is judged and how the judgements add up; the rest is shared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmpeft.eval.compare import compare_files
from vlmpeft.eval.interval import interval
from vlmpeft.eval.pope import DEFAULTS, OPTIONAL, REQUIRED, SUFFIX
from vlmpeft.eval.rows import Row, answer_text, join, read_rows
from vlmpeft.eval.runner import Answerer, ask, parse_arguments, run, table

Pair = tuple[Row, str]  # a question and the text that answers it


@dataclass(frozen=True)
class Benchmark:
    """How answers are judged.

    about: what the metrics repeat: `benchmark`, `parser` and whatever else decides the number.
    judge: (question, text) to what the answer's row gets; its `score` is from 0 to 1.
    total: all pairs to the metrics.
    suffix, max_new_tokens: of the benchmark's own prompt.
    candidates: all answers there can be, for `method=loglik`.
    """

    about: Mapping[str, str]
    judge: Callable[[Row, str], Mapping[str, Any]]
    total: Callable[[Sequence[Pair]], dict[str, Any]]
    suffix: str = SUFFIX
    max_new_tokens: int = 16
    candidates: tuple[str, ...] = ()

    def points(self, question: Row, text: str) -> float:
        """What an answer is worth, from 0 to 1."""
        return float(self.judge(question, text)["score"])

    def score(self, questions: Sequence[Row], answers: Sequence[Row]) -> dict[str, Any]:
        """Join by id and score. Raises: EvalError V601 for missing, extra or repeated ids, V602 for a wrong row."""
        return self.total([(question, answer_text(answer)) for question, answer in join(questions, answers)])

    def evaluate(
        self,
        bundle: Answerer,
        questions: Sequence[Row],
        images: str | Path,
        *,
        suffix: str | None = None,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        ablate: str = "none",
        progress: bool = True,
        method: str = "generate",
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Ask a model and score it. Returns: the answer rows in question order, and `score` of them."""
        for question in questions:
            self.judge(question, "")  # a wrong label is found before the model is asked
        answers = ask(
            bundle,
            questions,
            images,
            suffix=self.suffix if suffix is None else suffix,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            ablate=ablate,
            progress=progress,
            correct=self.points,
            method=method,
            candidates=self.candidates,
        )
        rows = [
            {key: value for key, value in row.items() if key != "margin"} | dict(self.judge(question, row["text"]))
            for question, row in zip(questions, answers, strict=True)
        ]
        return rows, self.score(questions, rows)


@dataclass(frozen=True)
class Command:
    """The command line of a benchmark, with model=DIR or with answers=FILE.

    doc: printed by `--help`.
    read: arguments to questions; the file is `questions`.
    make: arguments to the benchmark.
    show: metrics to the rows of the printed table.
    options: keys of the benchmark's own with their defaults.
    read_answers: path of given answers to their rows.
    """

    doc: str
    read: Callable[[Mapping[str, Any]], list[dict[str, Any]]]
    make: Callable[[Mapping[str, Any]], Benchmark]
    show: Callable[[Mapping[str, Any]], list[list[str]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    read_answers: Callable[[str], list[dict[str, Any]]] = read_rows

    def main(self, argv: Sequence[str]) -> None:
        """Score given answers, or run a model and score it."""
        given = any(argument.startswith("answers=") for argument in argv)
        (self.score_files if given else self.run_model)(argv)

    def score_files(self, argv: Sequence[str]) -> None:
        """With answers=FILE: scores as JSON on stdout; imports no torch."""
        arguments = parse_arguments(argv, {**self.options, **OPTIONAL}, ("questions", "answers"), self.doc)
        benchmark, questions = self.make(arguments), self.read(arguments)
        answers = self.read_answers(arguments["answers"])
        metrics = {**benchmark.about, **benchmark.score(questions, answers)}
        if arguments["compare"]:
            metrics["compare"] = compare_files(questions, answers, arguments["compare"], benchmark.points)
        print(json.dumps(metrics, ensure_ascii=False, indent=2))

    def run_model(self, argv: Sequence[str]) -> None:
        """With model=DIR: writes answers.jsonl and metrics.json into out, prints a table."""
        own = self.make(self.options)
        defaults = {**DEFAULTS, "suffix": own.suffix, "max_new_tokens": own.max_new_tokens, **self.options, **OPTIONAL}
        defaults |= {"method": "generate"} if own.candidates else {}
        arguments = parse_arguments(argv, defaults, REQUIRED, self.doc)
        benchmark, questions = self.make(arguments), self.read(arguments)
        for question in questions:
            benchmark.judge(question, "")

        def show(metrics: Mapping[str, Any]) -> None:
            print(table(self.show(metrics)))

        run(arguments, questions, benchmark.evaluate, benchmark.about, benchmark.points, show)


def accuracy(scores: Sequence[float]) -> dict[str, Any]:
    """Mean score with its 95 % bootstrap interval and the number of scores; 0.0 of none."""
    return {
        "accuracy": sum(scores) / len(scores) if scores else 0.0,
        "accuracy_ci95": interval(scores),
        "n": len(scores),
    }


def by_category(pairs: Sequence[Pair], points: Callable[[Row, str], float]) -> dict[str, Any]:
    """`accuracy` of all pairs, the number of empty answers, and `categories` where questions have a `category`."""
    groups: dict[str, list[float]] = {}
    scores = [points(question, text) for question, text in pairs]
    for (question, _), score in zip(pairs, scores, strict=True):
        if "category" in question:
            groups.setdefault(str(question["category"]), []).append(score)
    empty = sum(not text.strip() for _, text in pairs)
    metrics = {**accuracy(scores), "empty": empty, "unparsable": empty, "by_chance": 0}
    return metrics | ({"categories": {name: accuracy(groups[name]) for name in sorted(groups)}} if groups else {})


def category_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a printed table: each category, then all."""
    named = [*metrics.get("categories", {}).items(), ("all", metrics)]
    return [["category", "n", "accuracy"], *([name, str(m["n"]), f"{m['accuracy']:.4f}"] for name, m in named)]
