"""The questions of a run: asked before training, after it, once more without their images, and to find the best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmpeft import fs
from vlmpeft.build import Bundle
from vlmpeft.errors import ConfigError
from vlmpeft.eval import pope, short
from vlmpeft.eval.runner import Answerer, read_rows, resolve_images
from vlmpeft.recipe import EvalConfig

EVALUATION = "evaluation.json"
SAMPLES = "samples.jsonl"
ABLATIONS = ("blank", "shuffle", "noise")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """A question file and how it is scored: rows with a category by type, all others by POPE's rules."""

    name: str
    questions: Rows
    folder: str
    images: Sequence[Path]
    by_type: bool

    def ask(self, bundle: Answerer, config: EvalConfig, ablate: str = "none") -> tuple[Rows, dict[str, Any]]:
        """Returns: answer rows in the order of the questions, metrics."""
        module = short if self.by_type else pope
        answers, metrics = module.evaluate(
            bundle, self.questions, self.folder, suffix=config.suffix, batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens, ablate=ablate,
        )  # fmt: skip
        return answers, {"name": self.name, **metrics}


def benchmarks(config: EvalConfig, image_folder: str | None) -> list[Benchmark]:
    """Read and check the question files before a model loads.

    Raises: ConfigError C106, EvalError V602, DataError D103.
    """
    found = []
    folder = config.images or image_folder
    for name in (config.questions or "").split(","):
        if not name:
            continue
        if folder is None:
            raise ConfigError("C106", "eval.questions is set, but no image folder.", "set eval.images=DIR.")
        by_type = all("category" in row for row in read_rows(name))
        questions = read_rows(name) if by_type else pope.read_questions(name)
        paths = resolve_images(questions, folder)
        if "shuffle" in config.ablate and len(set(paths)) < 2:
            raise ConfigError("C106", f"eval.ablate has shuffle, but {name} is about one image.", "use noise.")
        found.append(Benchmark(Path(name).stem, questions, folder, paths, by_type))
    return found


def evaluate(bundle: Bundle, config: EvalConfig, chosen: Sequence[Benchmark], run_dir: Path, moment: str) -> None:
    """Ask every benchmark and keep metrics and answers under `moment`: before, after, or one of ABLATIONS."""
    metrics = []
    for benchmark in chosen:
        answers, scores = benchmark.ask(bundle, config, moment if moment in ABLATIONS else "none")
        metrics.append(scores)
        fs.write_text(
            run_dir / "answers" / f"{benchmark.name}-{moment}.jsonl",
            "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers),
        )
    fs.write_json(run_dir / EVALUATION, {**read(run_dir), moment: metrics})


def read(run_dir: Path) -> dict[str, Any]:
    """Metrics kept so far, by moment."""
    path = run_dir / EVALUATION
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_samples(chosen: Sequence[Benchmark], run_dir: Path, count: int = 240) -> None:
    """Questions with the answers before and after, evenly spread over the files, for the report."""
    rows: Rows = []
    for benchmark in chosen:
        before, after = (_answers(run_dir, benchmark.name, moment) for moment in ("before", "after"))
        step = max(1, len(benchmark.questions) * len(chosen) // count)
        for i in range(0, len(benchmark.questions), step):
            key = _key(benchmark.questions[i])
            rows.append(_sample(benchmark, i, before.get(key, {}), after[key]))
    fs.write_text(run_dir / SAMPLES, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def _answers(run_dir: Path, name: str, moment: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Answers by question: an interrupted run may have asked others before."""
    path = run_dir / "answers" / f"{name}-{moment}.jsonl"
    return {_key(row): row for row in read_rows(path)} if path.is_file() else {}


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row.get("setting", "")), str(row["question_id"])


def _sample(benchmark: Benchmark, index: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    question = benchmark.questions[index]
    if benchmark.by_type:
        correct = short.is_correct(question, after["text"], short.yes_no_categories(benchmark.questions))
    else:
        correct = pope.parse_answer(after["text"]) == question["label"]
    return {
        "image": str(benchmark.images[index]),
        "question": question["text"],
        "label": question["label"],
        "before": before.get("text"),
        "after": after["text"],
        "category": question.get("category", "yes/no"),
        "correct": correct,
    }
