"""One row of a paper's table: the scores of several runs in percent, and MobileVLM's average where all six are there.

  python -m vlmpeft.eval.summary runs=DIR,DIR,...

runs: output folders of benchmarks; each metrics.json gives one number. POPE's is the mean F1 of its settings, MME's the
perception sum, a benchmark's own accuracy otherwise, times 100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.errors import EvalError, run_command
from vlmpeft.eval.rows import read_document
from vlmpeft.eval.runner import parse_arguments, table

AVERAGED = ("gqa", "scienceqa-img", "textvqa", "pope", "mme", "mmbench")
MME_SHARE = 20  # of 2000 points, so that it is out of 100 like the others


def mobilevlm_average(scores: Mapping[str, float]) -> float:
    """Mean of GQA, ScienceQA-IMG, TextVQA, POPE, MME perception / 20 and MMBench, all but MME in percent.

    Source: the tables of MobileVLM (arXiv:2312.16886) and its README.
    Raises: EvalError V603 if one of the six is missing.
    """
    missing = [name for name in AVERAGED if name not in scores]
    if missing:
        raise EvalError("V603", f"no score of {', '.join(missing)}.", f"the average is of {', '.join(AVERAGED)}.")
    return math.fsum(scores[name] / (MME_SHARE if name == "mme" else 1) for name in AVERAGED) / len(AVERAGED)


def headline(metrics: Mapping[str, Any]) -> float:
    """The one number a table shows: accuracy or F1 in percent, MME's perception sum.

    Raises: EvalError V602 if the metrics have no such number.
    """
    names = {"pope": ("mean_f1", "f1"), "mme": ("perception",)}.get(str(metrics.get("benchmark")), ("accuracy",))
    value = next((metrics[name] for name in names if name in metrics), None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EvalError("V602", f"{metrics.get('benchmark')}: no {' or '.join(names)} among its metrics.")
    return float(value) if "perception" in names else 100 * float(value)


def gather(folders: Sequence[str | Path]) -> dict[str, float]:
    """Benchmark to its number, from the metrics.json of each folder.

    Raises: ConfigError C102 without that file; EvalError V601 for two runs of one benchmark, V602 for another layout.
    """
    scores: dict[str, float] = {}
    for folder in folders:
        path = Path(folder) / "metrics.json"
        metrics = read_document(path)
        if not isinstance(metrics, dict) or not isinstance(metrics.get("benchmark"), str):
            raise EvalError(
                "V602", f"{path}: no name of a benchmark.", "give folders that a benchmark's command wrote."
            )
        name = metrics["benchmark"]
        if name in scores:
            raise EvalError("V601", f"{path}: a second run of {name}.", "give one run of each benchmark.")
        scores[name] = headline(metrics)
    return scores


def main(argv: Sequence[str]) -> None:
    """Print the scores of the runs, and the average of the six where all are there."""
    arguments = parse_arguments(argv, {}, ("runs",), __doc__ or "")
    scores = gather([folder for folder in arguments["runs"].split(",") if folder])
    rows = [["benchmark", "score"], *([name, f"{value:.1f}"] for name, value in scores.items())]
    if all(name in scores for name in AVERAGED):
        rows.append(["MobileVLM average", f"{mobilevlm_average(scores):.1f}"])
    print(table(rows))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
