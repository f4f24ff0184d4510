"""GQA (arXiv:1902.09506): one short answer, right if it is the label exactly.

Run and score a model:
  python -m vlmpeft.eval.gqa model=DIR questions=FILE images=DIR out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.gqa questions=FILE answers=FILE [parser=official]

questions: JSON lines with question_id, image, text, label and, if wanted, category; or the official .json
(testdev_balanced_questions.json: imageId, question, answer, types).
parser: official compares lower-cased texts without a full stop at their end (LLaVA's conversion, then eval.py);
lmms-eval ignores case and every punctuation mark; strict compares the raw texts.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, nearest, run_command
from vlmpeft.eval.benchmark import Benchmark, Command, by_category, category_table
from vlmpeft.eval.rows import Row, read_document, read_rows

QUESTION_KEYS = ("question_id", "image", "text", "label")
PARSERS = ("official", "lmms-eval", "strict")
OPTIONS = {"parser": "official"}
UNPUNCTUATED = str.maketrans("", "", string.punctuation)


def normalise(text: str, parser: str = "official") -> str:
    """A text as it is compared with the label."""
    if parser == "strict":
        return text
    if parser == "lmms-eval":
        return text.lower().translate(UNPUNCTUATED)
    return text.rstrip(".").lower()  # LLaVA c121f04 scripts/convert_gqa_for_eval.py


def score(questions: Sequence[Row], answers: Sequence[Row], *, parser: str = "official") -> dict[str, Any]:
    """Join by id and score.

    Returns:
        accuracy, accuracy_ci95, n, empty, unparsable (the empty ones), by_chance (always 0) and, with categories,
        `categories`.

    Raises:
        EvalError: V601 for missing, extra or repeated ids, V602 for a label or text of a wrong kind.
    """
    return benchmark({"parser": parser}).score(questions, answers)


def benchmark(options: Mapping[str, Any]) -> Benchmark:
    """The benchmark with this `parser`. Raises: ConfigError C102 for an unknown one."""
    parser = str(options["parser"])
    if parser not in PARSERS:
        raise ConfigError("C102", f"no parser '{parser}'{nearest(parser, PARSERS)}")

    def points(question: Row, text: str) -> float:
        label = _label(question)
        return float(normalise(text, parser) == (label.lower() if parser == "official" else normalise(label, parser)))

    return Benchmark(
        about={"benchmark": "gqa", "parser": parser},
        judge=lambda question, text: {"label": question.get("label"), "score": points(question, text)},
        total=lambda pairs: by_category(pairs, points),
    )


def _label(question: Row) -> str:
    label = question.get("label")
    if not isinstance(label, str):
        raise EvalError("V602", f"question {question.get('question_id')}: label must be text, got {label!r}.")
    return label


def read_questions(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions of either layout. Raises: EvalError V602 for a row without what it needs."""
    path = arguments["questions"]
    if not str(path).endswith(".json"):
        return read_rows(path, QUESTION_KEYS)
    objects = read_document(path)
    try:
        return [
            {
                "question_id": number,
                "image": f"{row['imageId']}.jpg",
                "text": row["question"],
                "label": row["answer"],
                "category": row["types"]["structural"],
            }
            for number, row in objects.items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        fix = "give the official GQA file, or JSON lines as .jsonl."
        lack = f", {error} is missing" if isinstance(error, KeyError) else ""
        raise EvalError("V602", f"{path}: not the official layout{lack}.", fix) from error


COMMAND = Command(__doc__ or "", read_questions, benchmark, category_table, OPTIONS)
main = COMMAND.main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
