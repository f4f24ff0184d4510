"""MME (arXiv:2306.13394): two yes/no questions an image, 14 tasks; a task scores 100 accuracy + 100 accuracy+.

Run and score a model:
  python -m vlmpeft.eval.mme model=DIR questions=DIR images=DIR out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.mme questions=DIR answers=DIR [parser=official]

questions: a folder of TASK.txt as in the official eval_tool.zip (tab-separated image, question, answer and, in answers,
prediction), whose images are TASK/IMAGE or TASK/images/IMAGE; or JSON lines with question_id, image, text, label (yes
or no) and category (the task). answers: a folder of the same kind, or JSON lines with question_id and text.
parser: official reads the first four characters; lmms-eval first strips and takes a lone y or n; vlmevalkit wants the
word yes or no, not both; strict the word alone.
" Please answer yes or no." is taken off the questions, as LLaVA and lmms-eval do, since the suffix says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, nearest, run_command
from vlmpeft.eval.benchmark import Benchmark, Command, Pair, accuracy
from vlmpeft.eval.method import YES_NO
from vlmpeft.eval.pope_parse import parser_of
from vlmpeft.eval.rows import Row, read_rows

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)
QUESTION_KEYS = ("question_id", "image", "text", "label", "category")
PARSERS = ("official", "lmms-eval", "vlmevalkit", "strict")
OPTIONS = {"parser": "official"}
ASKED = " Please answer yes or no."


def parse_answer(text: str, parser: str = "official") -> str:
    """yes, no or other: the first of yes and no within the first four characters, lower-cased, unless by `pope_parse`.

    Source: MME eval_tool calculation.py; lmms-eval 75571cfe tasks/mme/utils.py. `know` and `snow` are no.
    """
    if parser in ("vlmevalkit", "strict"):
        return parser_of(parser)(text) or "other"
    head = text.lower()
    if parser == "lmms-eval":
        head = head.strip().replace(".", "")
        head = {"y": "yes", "n": "no"}.get(head, head)
    return next((word for word in ("yes", "no") if word in head[:4]), "other")


def score(questions: Sequence[Row], answers: Sequence[Row], *, parser: str = "official") -> dict[str, Any]:
    """Join by id and score.

    Returns:
        perception and cognition (sums of the task scores), accuracy, accuracy_ci95, n, other and unparsable (answers
        neither yes nor no, all wrong), by_chance (always 0), missing_tasks and `tasks`: name to score, accuracy,
        accuracy_plus (both questions of an image right), n, other.

    Raises:
        EvalError: V601 for missing, extra or repeated ids, V602 for an unknown task or label and for an image of a task
            that has not exactly two questions.
    """
    return benchmark({"parser": parser}).score(questions, answers)


def benchmark(options: Mapping[str, Any]) -> Benchmark:
    """The benchmark with this `parser`. Raises: ConfigError C102 for an unknown one."""
    parser = str(options["parser"])
    if parser not in PARSERS:
        raise ConfigError("C102", f"no parser '{parser}'{nearest(parser, PARSERS)}")

    def judge(question: Row, text: str) -> dict[str, Any]:
        parsed, label = parse_answer(text, parser), _label(question)
        place = {"category": question["category"], "label": label}
        return {**place, "parsed": parsed, "score": float(parsed == label)}

    def total(pairs: Sequence[Pair]) -> dict[str, Any]:
        return _total([(question, judge(question, text)) for question, text in pairs])

    return Benchmark({"benchmark": "mme", "parser": parser}, judge, total, candidates=YES_NO)


def _total(judged: Sequence[tuple[Row, Mapping[str, Any]]]) -> dict[str, Any]:
    tasks = {name: [j for j in judged if j[0]["category"] == name] for name in TASKS}
    scores = {name: _task(name, found) for name, found in tasks.items() if found}
    return {
        "perception": sum(scores[name]["score"] for name in PERCEPTION if name in scores),
        "cognition": sum(scores[name]["score"] for name in COGNITION if name in scores),
        **accuracy([judgement["score"] for _, judgement in judged]),
        "other": (other := sum(judgement["parsed"] == "other" for _, judgement in judged)),
        **{"unparsable": other, "by_chance": 0},
        "missing_tasks": [name for name in TASKS if name not in scores],
        "tasks": scores,
    }


def _task(name: str, judged: Sequence[tuple[Row, Mapping[str, Any]]]) -> dict[str, Any]:
    """Accuracy and accuracy+ of one task; its images are paired by name, not by their place in the file."""
    images: dict[str, list[bool]] = {}
    for question, judgement in judged:
        images.setdefault(question["image"], []).append(judgement["score"] == 1)
    wrong = next((image for image, right in images.items() if len(right) != 2), None)
    if wrong is not None:
        raise EvalError("V602", f"task {name}: image '{wrong}' has {len(images[wrong])} questions, not two.")
    share = sum(map(sum, images.values())) / len(judged)
    plus = sum(map(all, images.values())) / len(images)
    other = sum(judgement["parsed"] == "other" for _, judgement in judged)
    return {
        **{"score": 100 * share + 100 * plus, "accuracy": share, "accuracy_plus": plus},
        **{"n": len(judged), "other": other},
    }


def _label(question: Row) -> str:
    label, task = question.get("label"), str(question.get("category"))
    if task not in TASKS:
        place = f"question {question.get('question_id')}"
        raise EvalError("V602", f"{place}: no task '{task}'{nearest(task, TASKS)}")
    if not isinstance(label, str) or label.lower() not in ("yes", "no"):
        raise EvalError("V602", f"question {question.get('question_id')}: label must be yes or no, got {label!r}.")
    return label.lower()


def read_questions(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions of either layout, without " Please answer yes or no." Raises: EvalError V602 for a wrong row."""
    path, images = Path(arguments["questions"]), arguments.get("images")
    if not path.is_dir():
        return [{**row, "text": _asked(row["text"])} for row in read_rows(path, QUESTION_KEYS)]
    rows = _read_folder(path)
    for row in rows:
        inner = "images/" if images and (Path(images) / row["category"] / "images").is_dir() else ""
        row["image"] = f"{row['category']}/{inner}{row['image']}"
    return [{key: value for key, value in row.items() if key != "prediction"} for row in rows]


def read_answers(path: str) -> list[dict[str, Any]]:
    """Given answers: a folder of TASK.txt with predictions, keyed as the questions are; or JSON lines."""
    if not Path(path).is_dir():
        return read_rows(path)
    rows = _read_folder(Path(path))
    empty = next((row for row in rows if "prediction" not in row), None)
    if empty:
        raise EvalError("V602", f"{path}: {empty['question_id']} has no fourth column, the prediction.")
    return [{"question_id": row["question_id"], "prompt": row["text"], "text": row["prediction"]} for row in rows]


def _read_folder(folder: Path) -> list[dict[str, Any]]:
    """The rows of TASK.txt in the order of TASKS; ids are TASK/IMAGE/QUESTION."""
    rows = []
    for task in TASKS:
        file = folder / f"{task}.txt"
        lines = file.read_text(encoding="utf-8-sig").split("\n") if file.is_file() else []
        for number, line in enumerate(lines, start=1):
            cells = line.rstrip("\r").split("\t")
            if line.strip() and len(cells) not in (3, 4):
                raise EvalError("V602", f"{file} line {number}: {len(cells)} tab-separated cells, expected 3 or 4.")
            if line.strip():
                row = dict(zip(("image", "text", "label", "prediction"), cells, strict=False))
                text = _asked(row["text"])
                rows.append({**row, "text": text, "question_id": f"{task}/{row['image']}/{text}", "category": task})
    if not rows:
        raise ConfigError("C102", f"no TASK.txt in '{folder}'.", f"give a folder with for example {TASKS[0]}.txt.")
    return rows


def _asked(text: str) -> str:
    return text.removesuffix(ASKED)


def _table(metrics: Mapping[str, Any]) -> list[list[str]]:
    rows = [["task", "n", "accuracy", "accuracy+", "score"]]
    for name, m in metrics["tasks"].items():
        cells = [f"{m['accuracy']:.4f}", f"{m['accuracy_plus']:.4f}", f"{m['score']:.2f}"]
        rows.append([name, str(m["n"]), *cells])
    return [*rows, *([name, "", "", "", f"{metrics[name]:.2f}"] for name in ("perception", "cognition"))]


COMMAND = Command(__doc__ or "", read_questions, benchmark, _table, OPTIONS, read_answers)
main = COMMAND.main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
