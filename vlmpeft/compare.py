"""Compare ways to tune: every arm from the same start, with the same data and steps, over several seeds.

python -m vlmpeft.compare recipe=compare_tuners
python -m vlmpeft.compare recipe=compare_tuners compare.only=[lora,dora] compare.seeds=[0] compare.hours=1.5

The same command goes on where it was stopped or killed, and makes again what has changed or failed. In compare.dir:
table.md, table.json, figures and report.html, made anew each time; results/ with each run's answers, runs/ with its
recipe and losses, start/ with what the arms start from. Every other key is one of `vlmpeft train --help`, for all arms.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft.compare_config import Comparison, read_comparison
from vlmpeft.config import load_comparison, recipe_names, recipe_of
from vlmpeft.errors import INTERNAL, PREEMPTED, ConfigError, VlmpeftError, run_command
from vlmpeft.eval.paths import resolve_images
from vlmpeft.eval.pope import read_questions
from vlmpeft.eval.runner import table

if TYPE_CHECKING:
    from vlmpeft.compare_loop import Results

SCENES = "python -m vlmpeft.scenes out=runs/compare_scenes pretrain=1200 train=560 test=384"
KEYS = """
Keys of the section `compare`:
  compare.dir=runs/compare        compare.seeds=[0,1,2]            compare.reference=ARM
  compare.only=[ARM,...]          compare.hours=null               compare.lmar=false
  compare.sweep.seed=0            compare.sweep.steps=null         compare.sweep.images=50
  compare.batch_size=8            compare.start=null               compare.results=null
  compare.arms.NAME=null leaves an arm out
  compare.arms.NAME.tuners.TUNER.key=value  compare.arms.NAME.lr=[...]  compare.sets.NAME.questions=FILE
"""


def main(argv: Sequence[str]) -> int:
    """Make the runs that are missing, write the tables.

    Returns: 0; 143 after SIGTERM; the status of the first run that failed.
    """
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nComparisons: {', '.join(recipe_names(comparisons=True))}, or a YAML file.\n{KEYS}")
        return 0
    names = [a.removeprefix("recipe=") for a in argv if a.startswith("recipe=")]
    if not names:
        known = ", ".join(recipe_names(comparisons=True))
        raise ConfigError("C106", "recipe is not set.", f"write recipe=NAME, one of: {known}, or a YAML file.")
    section, shared = load_comparison(names[-1], [a for a in argv if not a.startswith("recipe=")])
    comparison = _without_missing(read_comparison(section))
    questions = {name: _questions(comparison, shared, name) for name in comparison.sets}
    from vlmpeft.compare_loop import Results
    from vlmpeft.compare_plan import Plan
    from vlmpeft.workspace import locked

    directory = Path(comparison.dir)
    results = Results(Plan(comparison, shared, questions), directory)
    with locked(directory):
        return _run(results, directory, str(shared.get("title") or names[-1]))


def _without_missing(comparison: Comparison) -> Comparison:
    """A comparison without the optional sets whose questions are not there."""
    missing = [k for k, chosen in comparison.sets.items() if chosen.optional and not Path(chosen.questions).is_file()]
    for name in missing:
        print(f"{name}: left out, there is no {comparison.sets[name].questions}")
    return replace(comparison, sets={k: chosen for k, chosen in comparison.sets.items() if k not in missing})


def _questions(comparison: Comparison, shared: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The questions of a set, once their images are known to be there. Raises: ConfigError C106, C110; DataError."""
    chosen = comparison.sets[name]
    if not Path(chosen.questions).is_file():
        message = f"compare.sets.{name}.questions={chosen.questions}: no such file."
        raise ConfigError("C110", message, f"give a file of yes/no questions, or draw the scenes with {SCENES}")
    rows = read_questions(chosen.questions)
    folder = chosen.images or recipe_of(shared, chosen.recipe).data.images
    if folder is None:
        raise ConfigError("C106", f"compare.sets.{name} has no image folder.", "set data.images=DIR.")
    resolve_images(rows, folder)
    return rows


def _run(results: Results, directory: Path, title: str) -> int:
    """Make the runs, then tables from all there are. Returns: as `main`."""
    from tqdm import tqdm

    from vlmpeft.compare_loop import line_of, run_all
    from vlmpeft.compare_report import write_all
    from vlmpeft.compare_run import Runner
    from vlmpeft.compare_table import LEGEND, grid
    from vlmpeft.stopping import Preempted, StopSignal

    plan, status, left = results.plan, 0, 0
    try:
        with StopSignal() as stop:
            left = run_all(plan, results, Runner(plan, directory, stop), tqdm.write)
    except Preempted:
        status = PREEMPTED
    for name, lines in write_all(results, directory, title).items():
        print(f"\n{name}\n{table(grid(lines))}")
    print(f"\n{LEGEND.format(reference=plan.comparison.reference)}")
    for file, error in results.errors.items():
        status = status or (error.exit_status if isinstance(error, VlmpeftError) else INTERNAL)
        print(f"failed: {file}: {line_of(error)}")
    if status == PREEMPTED or left:
        print(f"{left or 'some'} runs are left: the same command goes on with them")
    print(f"{directory / 'table.md'}, {directory / 'report.html'}")
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))
