"""MMMU (arXiv:2311.16502): college-level questions of 30 subjects about images, multiple choice and open.

Ask and score a model:
  python -m vlmpeft.eval.mmmu model=DIR data=DIR_OR_PARQUET out=DIR [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.mmmu data=DIR_OR_PARQUET answers=FILE [key=value ...]

data: MMMU's parquet files, one or all of a split below a folder (split=validation|dev|test).
answers: JSON lines with id and text, or one JSON object {id: text}.
mode: first shows image_1 in front, as the official runs of LLaVA do; interleave puts each image where it is named;
lmms-eval shows each named image once, in front.
prompt: official or lmms-eval.
parser: official; eval-only (main_eval_only.py: a letter that was parsed before, open questions as official); lmms-eval;
vlmevalkit (without its judge model); strict (the letter alone; of an open question the text alone). official and
lmms-eval decide by chance what they cannot read, the others nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmpeft.errors import ConfigError, run_command
from vlmpeft.eval.choices import (
    Item,
    Judge,
    Options,
    Parser,
    Predictions,
    Verdict,
    judge_with,
    parse_strict,
    parse_vlmevalkit,
    score_items,
    tally,
)
from vlmpeft.eval.choices_run import ChoiceBenchmark, command
from vlmpeft.eval.mmmu_data import DOMAIN_OF, DOMAINS, item_of, read_rows_of, subject_of
from vlmpeft.eval.mmmu_parse import (
    is_correct_open,
    normalise,
    parse_multi_choice,
    parse_multi_choice_lmms_eval,
    parse_open,
)
from vlmpeft.eval.rows import Row

__all__ = ["BENCHMARK", "DOMAINS", "is_correct_open", "item_of", "main", "parse_multi_choice", "parse_open"]
__all__ += ["read_items", "score", "subject_of"]
MODES = ("first", "interleave", "lmms-eval")
PROMPTS = ("official", "lmms-eval")


def judge_open(item: Item, text: str) -> Verdict:
    """An open question by the official rules."""
    return Verdict(parse_open(text), is_correct_open(item.answer or (), text), empty=not text.strip())


def judge_open_strict(item: Item, text: str) -> Verdict:
    """An open question whose whole answer has to be a right text, or number to two decimals."""
    said = normalise(text)
    right = [value for gold in item.answer or () for value in normalise(gold)]
    return Verdict(said if text.strip() else None, any(value in right for value in said))


def judge_open_vlmevalkit(item: Item, text: str) -> Verdict:
    """An open question as VLMEvalKit puts it: a choice between A, the right text, and B, "Other Answers".

    Of several right texts any will do, which it leaves open. Source: vlmeval MMMU data at e8e78f05 (its issue 1617).
    """
    chosen = [parse_vlmevalkit(text, {"A": gold, "B": "Other Answers"}) for gold in item.answer or ()]
    right = "A" in chosen
    return Verdict("A" if right else next((letter for letter in chosen if letter), None), right)


def judge_by_type(parser: Parser, chance: bool, open_judge: Judge) -> Judge:
    """Choices by a parser, open questions by a judge of their own."""
    choose = judge_with(parser, chance)
    return lambda item, text: (choose if item.options else open_judge)(item, text)


def parse_letter(text: str, options: Options) -> str | None:
    """The letter as it is: nothing is parsed. Source: MMMU main_eval_only.py, which compares it for equality."""
    return text if text in options else None


JUDGES: dict[str, Judge] = {
    "official": judge_by_type(parse_multi_choice, True, judge_open),
    "eval-only": judge_by_type(parse_letter, False, judge_open),
    "lmms-eval": judge_by_type(parse_multi_choice_lmms_eval, True, judge_open),
    "vlmevalkit": judge_by_type(parse_vlmevalkit, False, judge_open_vlmevalkit),
    "strict": judge_by_type(parse_strict, False, judge_open_strict),
}


def score(predictions: Predictions, items: Sequence[Row], parser: str = "official") -> dict[str, Any]:
    """Join by id and score.

    Args:
        predictions: {id: text}, or rows with id and text.
        items: rows of MMMU's columns; of these id, options, answer and question_type.

    Returns:
        accuracy (over all items, so instance-weighted), correct, n, unparsable, by_chance, accuracy_without_chance,
        empty; `subjects` and `domains`: name to accuracy, correct, n; `missing_subjects`.

    Raises:
        EvalError: V601 for missing, extra or repeated ids, V602 for an item or answer of a wrong kind.
    """
    judge = BENCHMARK.judge(parser)
    return score_items([item_of(row) for row in items], predictions, judge, summarise)


def summarise(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """As `tally`, with the subjects nothing was asked about: an overall figure without them is not MMMU's."""
    present = {item.groups["subjects"] for item in items}
    return {**tally(items, verdicts), "missing_subjects": sorted(DOMAIN_OF.keys() - present)}


def read_items(arguments: Mapping[str, Any], images: bool) -> list[Item]:
    """Items of data=, split=, mode= and prompt=. Raises: ConfigError C102; EvalError V602."""
    for key, known in (("mode", MODES), ("prompt", PROMPTS)):
        if arguments[key] not in known:
            raise ConfigError("C102", f"{key}={arguments[key]}: no such {key}.", f"choose {' or '.join(known)}.")
    rows = read_rows_of(arguments["data"], arguments["split"], images)
    return [item_of(row, arguments["mode"], arguments["prompt"]) for row in rows]


BENCHMARK = ChoiceBenchmark(
    name="mmmu",
    doc=__doc__ or "",
    read=read_items,
    judges=JUDGES,
    options={"split": "validation", "mode": "first", "prompt": "official"},
    summarise=summarise,
)


def main(argv: Sequence[str]) -> None:
    """Score given answers, or ask a model and score it."""
    command(argv, BENCHMARK)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
