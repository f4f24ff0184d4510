"""An evaluation in its output folder: begun or gone on with, by one process or several, and its results written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft.errors import ConfigError
from vlmpeft.eval.answer_log import METRICS, AnswerLog, close_folder, locked, open_folder, part_file
from vlmpeft.eval.asking import Remembering
from vlmpeft.eval.identity import model_facts
from vlmpeft.eval.model import open_model
from vlmpeft.eval.rows import Row, read_rows, write_json, write_rows
from vlmpeft.eval.team import Team, joined
from vlmpeft.eval.wrong_page import FILE, SHOWN, Wrong, write_wrong

if TYPE_CHECKING:
    from vlmpeft.eval.runner import Answerer

ANSWERS = "answers.jsonl"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What a benchmark does with a model.

    settings: what answers and figures depend on; a folder with others is refused.
    source: where model, questions and images are; written beside the settings.
    ask: (model, whether to show progress) to answer rows and metrics.
    compare: answer rows to `{"compare": ...}`; None without another run to compare with.
    wrong: answer rows to those that are wrong, for `wrong.html`; None where right and wrong cannot be told.
    """

    settings: Mapping[str, Any]
    source: Mapping[str, Any]
    ask: Callable[[Answerer, bool], tuple[Rows, dict[str, Any]]]
    compare: Callable[[Sequence[Row]], Mapping[str, Any]] | None = None
    wrong: Callable[[Sequence[Row]], list[Wrong]] | None = None


def carry_out(
    evaluation: Evaluation, arguments: Mapping[str, Any], show: Callable[[Mapping[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Ask the model of a command line what is not answered yet, and write answers.jsonl, wrong.html, metrics.json.

    A finished folder with these settings is left as it is. Of several processes each asks its share; the first writes.
    Args: show: told the metrics when all is written, in the first process alone.
    Returns: the metrics; {} in a process that does not write and has nothing to ask.
    Raises: ConfigError C111, CheckpointError K210, K211, EnvironmentFault; and as loading and asking the model.
    """
    folder = prepare_folder(arguments["out"])
    settings = {**evaluation.settings, **model_facts(arguments["model"])}
    with joined(arguments["device"]) as team, locked(folder) if team.main else contextlib.nullcontext():
        found = open_folder(folder, settings, bool(arguments.get("overwrite"))) if team.main else None
        team.wait()
        if part_file(folder, 0).is_file():
            metrics = _ask(evaluation, arguments, settings, folder, team)
        else:
            metrics = _finished(evaluation, found or {}, folder, team)
        if team.main and show is not None:
            show(metrics)
    return metrics


def _ask(
    evaluation: Evaluation, arguments: Mapping[str, Any], settings: Mapping[str, Any], folder: Path, team: Team
) -> dict[str, Any]:
    """Ask and write; the parts go last, so that a kill at any moment leaves something to go on from."""
    bundle = open_model(arguments["model"], team.device)
    answers, metrics = evaluation.ask(Remembering(bundle, AnswerLog(folder, team)), team.main)
    if team.main:
        if evaluation.compare is not None:
            metrics = {**metrics, **evaluation.compare(answers)}
        whole = {**settings, **evaluation.source, **metrics}
        write_rows(folder / ANSWERS, answers)
        if evaluation.wrong is not None:
            write_wrong(folder / FILE, evaluation.wrong(answers), whole, arguments.get("wrong", SHOWN))
        write_json(folder / METRICS, whole)
    team.wait()  # until all have read the parts
    if team.main:
        close_folder(folder)
    return metrics


def _finished(evaluation: Evaluation, metrics: dict[str, Any], folder: Path, team: Team) -> dict[str, Any]:
    """The metrics of a finished folder, with a comparison if one is asked for now."""
    if team.main:
        print(f"already complete: {folder / METRICS}")
        if evaluation.compare is not None:
            metrics = {**metrics, **evaluation.compare(read_rows(folder / ANSWERS))}
            write_json(folder / METRICS, metrics)
    return metrics


def prepare_folder(out: str | Path) -> Path:
    """Create the output folder. Raises: ConfigError C111 if nothing can be written there."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise ConfigError("C111", f"out={out}: {reason}.", "choose a folder that can be written.") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError("C111", f"out={out} cannot be written.", "choose a folder that can be written.")
    return folder
