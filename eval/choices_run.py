"""The command line that the multiple-choice benchmarks share: ask a model about items, or score given answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, nearest
from vlmpeft.eval.ablate import check_ablation
from vlmpeft.eval.choices import (
    Item,
    Judge,
    Predictions,
    Summary,
    answer_rows,
    keyed,
    refuse_repeated,
    score_items,
    tally,
)
from vlmpeft.eval.choices_ask import check_candidates, evaluate, facts, wrong_of
from vlmpeft.eval.compare import compare_files, texts_of
from vlmpeft.eval.identity import digest
from vlmpeft.eval.method import check_method
from vlmpeft.eval.paths import check_pictures
from vlmpeft.eval.rows import read_rows
from vlmpeft.eval.runner import Answerer, parse_arguments, table
from vlmpeft.eval.session import Evaluation, carry_out

ASKING = {"batch_size": 16, "ablate": "none", "max_new_tokens": 64, "device": "auto", "overwrite": False}
ASKING |= {"method": "generate", "candidates": "letters", "wrong": 60}
PATHS = ("images",)  # options of a benchmark that say where something is, and nothing of the result
OPTIONAL = {"compare": None}


@dataclass(frozen=True)
class ChoiceBenchmark:
    """What a benchmark adds to the shared command line.

    Args:
        doc: printed by `--help`.
        read: the items; the second argument says whether a model will be asked, so that their images are needed.
        judges: by the name of their parser; the first is the default.
        options: further keys with their defaults.
    """

    name: str
    doc: str
    read: Callable[[Mapping[str, Any], bool], list[Item]]
    judges: Mapping[str, Judge]
    options: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ("data",)
    summarise: Summary = tally

    @property
    def defaults(self) -> dict[str, Any]:
        return {"parser": next(iter(self.judges)), **self.options}

    def judge(self, parser: str) -> Judge:
        """Raises: ConfigError C102 for an unknown parser."""
        if parser not in self.judges:
            raise ConfigError("C102", f"parser={parser}: no such parser{nearest(parser, self.judges)}")
        return self.judges[parser]


def command(argv: Sequence[str], benchmark: ChoiceBenchmark) -> None:
    """Score given answers (answers=FILE), or ask a model and score it."""
    given = any(argument.startswith("answers=") for argument in argv)
    (_score_files if given else _run_model)(argv, benchmark)


def _score_files(argv: Sequence[str], benchmark: ChoiceBenchmark) -> None:
    """With answers=FILE: scores as JSON on stdout; imports no torch."""
    known = {**benchmark.defaults, **OPTIONAL}
    arguments = parse_arguments(argv, known, (*benchmark.required, "answers"), benchmark.doc)
    judge, items = benchmark.judge(arguments["parser"]), benchmark.read(arguments, False)
    answers = answer_rows(read_answers(arguments["answers"]))
    metrics = score_items(items, answers, judge, benchmark.summarise)
    about = {"benchmark": benchmark.name, **{key: arguments[key] for key in benchmark.defaults}}
    print(json.dumps({**about, **metrics, **_compared(items, answers, arguments, judge)}, ensure_ascii=False, indent=2))


def _run_model(argv: Sequence[str], benchmark: ChoiceBenchmark) -> None:
    """With model=DIR: writes answers.jsonl and metrics.json into out, prints a table."""
    needed = ("model", *benchmark.required, "out")
    arguments = parse_arguments(argv, {**benchmark.defaults, **ASKING, **OPTIONAL}, needed, benchmark.doc)
    check_ablation(arguments["ablate"])
    check_method(arguments["method"])
    check_candidates(arguments["candidates"])
    judge, items = benchmark.judge(arguments["parser"]), benchmark.read(arguments, True)
    refuse_repeated(items)
    check_pictures(image for item in items for image in item.images if isinstance(image, Path))
    if arguments["compare"]:
        texts_of(arguments["compare"], keyed(items))
    asking = {key: arguments[key] for key in ("batch_size", "max_new_tokens", "ablate", "method", "candidates")}

    def ask_model(bundle: Answerer, progress: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return evaluate(bundle, items, judge, summarise=benchmark.summarise, progress=progress, **asking)

    own = {key: arguments[key] for key in benchmark.defaults if key not in PATHS}
    evaluation = Evaluation(
        settings={"benchmark": benchmark.name, **own, **asking, "questions_sha256": digest(map(facts, items))},
        source={key: arguments[key] for key in ("model", *benchmark.required, *PATHS) if key in arguments},
        ask=ask_model,
        compare=(lambda answers: _compared(items, answers, arguments, judge)) if arguments["compare"] else None,
        wrong=lambda answers: wrong_of(items, answers),
    )
    carry_out(evaluation, arguments, lambda metrics: print(summary_table(metrics)))


def _compared(
    items: Sequence[Item], answers: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], judge: Judge
) -> dict[str, Any]:
    """`compare`: the paired test against the run that compare= names, if it does."""
    if not arguments["compare"]:
        return {}
    by_id = {item.id: item for item in items}

    def correct(row: Mapping[str, Any], text: str) -> bool:
        return judge(by_id[row["question_id"]], text).correct

    return {"compare": compare_files(keyed(items), answers, arguments["compare"], correct)}


def read_answers(path: str | Path) -> Predictions:
    """Answers of a file: JSON lines, one JSON list of rows, or one JSON object {id: text}.

    Raises: ConfigError C102 if there is no such file; EvalError V601 for an id twice in an object, V602 for bad JSON.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError):
        return read_rows(path)  # JSON lines, or it says what is wrong with the file
    if isinstance(content, dict) and not {"question_id", "id"} & content.keys():
        return content
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) for row in rows):
        raise EvalError("V602", f"{path}: expected a list of objects.", "write one object an answer.")
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise EvalError("V601", f"{len(twice)} repeated answers: {', '.join(twice[:20])}.", "keep one of each.")
    return found


def summary_table(metrics: Mapping[str, Any]) -> str:
    """Groups and the whole as aligned lines; of hidden answers the counts."""
    if "accuracy" not in metrics:
        return f"{metrics['n']} answers, {metrics['unparsable']} unparsable; the right answers are hidden"
    kinds = {kind: found for kind, found in metrics.items() if isinstance(found, dict) and kind != "compare"}
    groups = [(f"{kind}: {name}", m) for kind, found in kinds.items() for name, m in found.items()]
    rows = [["group", "n", "correct", "accuracy"]]
    rows += [[name, str(m["n"]), str(m["correct"]), f"{m['accuracy']:.4f}"] for name, m in [*groups, ("all", metrics)]]
    return table(rows) + f"\n{metrics['unparsable']} unparsable, {metrics['by_chance']} decided by chance"
