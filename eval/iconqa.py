"""IconQA (arXiv:2110.13214): questions about diagrams, with text choices (task=text) or a blank to fill (task=blank).

Ask and score a model:
  python -m vlmpeft.eval.iconqa model=DIR data=DIR out=DIR [task=blank] [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.iconqa data=DIR answers=FILE [task=blank] [key=value ...]

data: the folder of problems.json and pid_splits.json. images: the folder of SPLIT/TASK/PID/image.png, DATA/iconqa if
not given. answers: JSON lines with question_id and text.
parser: official, lenient or strict. The owners score classifiers over answers, not text: official compares a blank
with the answer letter by letter, as they do, and reads a choice by LLaVA's ScienceQA rule; lenient drops case,
articles, trailing punctuation and number words of a blank and reads a choice by VLMEvalKit's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval.choices import (
    LETTER,
    Item,
    Judge,
    Parser,
    Verdict,
    judge_with,
    lettered,
    literal,
    option_lines,
    parse_strict,
    parse_vlmevalkit,
)
from vlmpeft.eval.choices_run import ChoiceBenchmark, command
from vlmpeft.eval.paths import resolve_images
from vlmpeft.eval.scienceqa import parse_llava, split_of
from vlmpeft.eval.short import normalise

SHORT = "\nAnswer the question using a single word or phrase."
TASKS = {"text": "choose_txt", "blank": "fill_in_blank"}


def judge_by_task(parser: Parser, same: Callable[[str], str]) -> Judge:
    """Choices by a parser; a blank is right if `same` makes it equal to the answer."""
    choose = judge_with(parser)

    def judge(item: Item, text: str) -> Verdict:
        if item.options:
            return choose(item, text)
        said = same(text) or None
        return Verdict(said, said in {same(gold) for gold in item.answer or ()})

    return judge


def read_items(arguments: Mapping[str, Any], images: bool) -> list[Item]:
    """The problems of a task and a split. Raises: ConfigError C102, EvalError V602, DataError D103."""
    folder, split = Path(arguments["data"]), arguments["split"]
    if arguments["task"] not in TASKS:
        raise ConfigError("C102", f"task={arguments['task']}: no such task.", f"choose {' or '.join(TASKS)}.")
    task = TASKS[arguments["task"]]
    problems = split_of(folder, f"{task}_{split}")
    paths: list[Path | None] = [None] * len(problems)
    if images:
        asked = [{"question_id": pid, "image": f"{split}/{task}/{pid}/image.png"} for pid in problems]
        paths = [*resolve_images(asked, arguments["images"] or folder / "iconqa")]
    return [_item(pid, problem, path) for (pid, problem), path in zip(problems.items(), paths, strict=True)]


def _item(pid: str, problem: Mapping[str, Any], path: Path | None) -> Item:
    images = () if path is None else (path,)
    answer = problem.get("answer")
    if "choices" not in problem:
        return Item(pid, {}, (str(answer),), literal(problem["question"] + SHORT), images, _groups(problem))
    options = lettered(problem["choices"], pid)
    if not str(answer).isdecimal() or int(str(answer)) >= len(options):
        raise EvalError("V602", f"question {pid}: answer must be an index of its choices, got {answer!r}.")
    prompt = literal(f"{problem['question']}\n{option_lines(options)}{LETTER}")
    return Item(pid, options, list(options)[int(str(answer))], prompt, images, _groups(problem))


def _groups(problem: Mapping[str, Any]) -> dict[str, str]:
    return {"grades": str(problem["grade"])} if "grade" in problem else {}


BENCHMARK = ChoiceBenchmark(
    name="iconqa",
    doc=__doc__ or "",
    read=read_items,
    judges={
        "official": judge_by_task(parse_llava, str),
        "lenient": judge_by_task(parse_vlmevalkit, normalise),
        "strict": judge_by_task(parse_strict, str),
    },
    options={"task": "text", "split": "test", "images": ""},
)


def main(argv: Sequence[str]) -> None:
    """Score given answers, or ask a model and score it."""
    command(argv, BENCHMARK)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
