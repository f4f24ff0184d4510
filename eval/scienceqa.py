"""ScienceQA-IMG (arXiv:2209.09513): school science questions with an image. Parser as in LLaVA's eval_science_qa.py.

Ask and score a model:
  python -m vlmpeft.eval.scienceqa model=DIR data=DIR out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.scienceqa data=DIR answers=FILE [key=value ...]

data: the folder of problems.json and pid_splits.json. images: the folder of PID/image.png, DATA/images/SPLIT if not
given. answers: JSON lines with question_id and text. parser: official (LLaVA's), lmms-eval, strict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, nearest, run_command
from vlmpeft.eval.choices import LETTER, Item, Options, judge_with, lettered, literal, option_lines, parse_strict
from vlmpeft.eval.choices_run import ChoiceBenchmark, command
from vlmpeft.eval.paths import resolve_images

ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
LOWER_GRADES = {f"grade{n}" for n in range(1, 7)}


def parse_llava(text: str, options: Options) -> str | None:
    """A letter A to E alone; in front as "B. "; or in one single "The answer is B." Nothing is stripped.

    Source: llava/eval/eval_science_qa.py at c121f04.
    """
    if text in "ABCDE" and len(text) == 1:
        letter = text
    elif text[:1] in "ABCDE" and text[1:3] == ". ":
        letter = text[0]
    else:
        said = ANSWER_IS.findall(text)
        letter = said[0] if len(said) == 1 else ""
    return letter if letter in options else None


def parse_lmms_eval(text: str, options: Options) -> str | None:
    """A letter alone, in either case, or a capital in front as "B.". Source: lmms_eval/tasks/scienceqa/utils.py."""
    if text.upper() in options:
        return text.upper()
    return text[0] if text[1:2] == "." and text[0] in options else None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises: ConfigError C102 if there is no such file, EvalError V602 if it is no object."""
    if not path.is_file():
        raise ConfigError("C102", f"no file '{path}'.", "data=DIR is the folder that holds it.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EvalError("V602", f"{path} is no JSON: {error}.", "download it again.") from error
    if not isinstance(value, dict):
        raise EvalError("V602", f"{path}: expected an object, got {type(value).__name__}.", "download it again.")
    return value


def split_of(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Problems of one split of pid_splits.json by id. Raises: ConfigError C102 for an unknown split; as `read_json`."""
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if name not in splits:
        raise ConfigError("C102", f"split={name}: no such split in {folder}{nearest(name, splits)}")
    missing = [str(pid) for pid in splits[name] if str(pid) not in problems]
    if missing:
        raise EvalError("V602", f"{folder}: {len(missing)} ids of {name} are no problems; the first is {missing[0]}.")
    return {str(pid): problems[str(pid)] for pid in splits[name]}


def read_items(arguments: Mapping[str, Any], images: bool) -> list[Item]:
    """The problems of a split that have an image. Raises: ConfigError C102, EvalError V602, DataError D103."""
    folder, split = Path(arguments["data"]), arguments["split"]
    problems = {pid: problem for pid, problem in split_of(folder, split).items() if problem.get("image")}
    paths: list[Path | None] = [None] * len(problems)
    if images:
        asked = [{"question_id": pid, "image": f"{pid}/{problem['image']}"} for pid, problem in problems.items()]
        paths = [*resolve_images(asked, arguments["images"] or folder / "images" / split)]
    pairs = zip(problems.items(), paths, strict=True)
    return [_item(pid, problem, path, arguments["suffix"]) for (pid, problem), path in pairs]


def _item(pid: str, problem: Mapping[str, Any], path: Path | None, suffix: str) -> Item:
    options = lettered(problem.get("choices", ()), pid)
    answer = problem.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise EvalError("V602", f"question {pid}: answer must be an index of its choices, got {answer!r}.")
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    prompt = literal(f"{context}{problem['question']}\n{option_lines(options)}{suffix}")
    grades = "1-6" if problem.get("grade") in LOWER_GRADES else "7-12"
    groups = {"subjects": str(problem.get("subject", "")), "grades": grades}
    return Item(pid, options, list(options)[answer], prompt, () if path is None else (path,), groups)


BENCHMARK = ChoiceBenchmark(
    name="scienceqa-img",
    doc=__doc__ or "",
    read=read_items,
    judges={
        "official": judge_with(parse_llava),
        "lmms-eval": judge_with(parse_lmms_eval),
        "strict": judge_with(parse_strict),
    },
    options={"split": "test", "images": "", "suffix": LETTER},
)


def main(argv: Sequence[str]) -> None:
    """Score given answers, or ask a model and score it."""
    command(argv, BENCHMARK)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
