"""Merge LoRA adapters, or average runs.

python -m vlmpeft.adapters merge a=runs/a/final b=runs/b/final weights=[0.5,0.5] method=ties density=0.5 out=merged
python -m vlmpeft.adapters soup runs=[runs/a/final,runs/b/final] out=soup

merge   the updates scale * B A of PEFT folders, or of the adapters of model directories, of any rank, scale and layers,
        as one folder that stock peft loads
  a= b= c=...   the adapters, a letter each
  weights       [w,w,...], one each, in the order of the letters; 1 for each if not given
  method        linear or cat (the weighted sum, exactly), svd, ties, dare_linear, dare_ties
  density       share of the entries that ties and dare keep
  r             rank of the result for svd, ties and dare; full: no approximation
  seed          of what dare drops
  device        where ties and dare are computed
soup    the mean of everything that runs of one recipe trained, as a model directory
"""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft.errors import ConfigError, nearest, run_command
from vlmpeft.eval.runner import parse_arguments

if TYPE_CHECKING:
    from vlmpeft.adapter_merge import Merged, MergePlan

DEFAULTS = {"weights": "", "method": "linear", "density": "1", "r": "", "seed": "0", "device": "cpu"}
LETTERS = set(string.ascii_lowercase) - DEFAULTS.keys()


def main(argv: Sequence[str]) -> None:
    """Run `merge` or `soup`."""
    actions = {"merge": _merge, "soup": _soup}
    if not argv or argv[0] in ("--help", "-h"):
        print((__doc__ or "").strip())
    elif argv[0] not in actions:
        raise ConfigError("C100", f"adapters {argv[0]}: no such action{nearest(argv[0], actions)}")
    else:
        actions[argv[0]](argv[1:])


def _merge(argv: Sequence[str]) -> None:
    letters = sorted({"a", "b"} | {a.partition("=")[0] for a in argv} & LETTERS)
    arguments = parse_arguments(argv, DEFAULTS, (*letters, "out"), __doc__ or "")
    plan = _plan(arguments, len(letters))
    from vlmpeft.adapter_files import read_adapter, write_adapter
    from vlmpeft.adapter_merge import merge
    from vlmpeft.build import choose_device
    from vlmpeft.conversion import free_directory

    out = free_directory(arguments["out"])
    adapters = {letter: read_adapter(Path(arguments[letter])) for letter in letters}
    merged = merge(adapters, plan, choose_device(arguments["device"]))
    r = write_adapter(merged.adapter, out)
    print(_report(merged, plan))
    print(f"{out} ({plan.method}, {len(merged.adapter.layers)} layers, rank {r})")


def _plan(arguments: dict[str, Any], count: int) -> MergePlan:
    """The arguments as a plan. Raises: ConfigError C102."""
    from vlmpeft.adapter_merge import MergePlan

    weights, r = _items(arguments["weights"]), arguments["r"]
    return MergePlan(
        tuple(_number("weights", w) for w in weights) if weights else (1.0,) * count,
        arguments["method"],
        _number("density", arguments["density"]),
        r if r == "full" else _integer("r", r) if r else None,
        _integer("seed", arguments["seed"]),
    )


def _report(merged: Merged, plan: MergePlan) -> str:
    """The relative error of every layer and of all; one line where nothing is lost by design."""
    from vlmpeft.adapter_merge import EXACT

    if plan.method in EXACT:
        return "exact: the result is the weighted sum of the updates"
    lines = [f"  {path:<50} {merged.relative(path):.3e}" for path in merged.adapter.layers]
    return "\n".join(
        ["relative Frobenius error of the cut to this rank, by layer", *lines, f"  {'all':<50} {merged.overall:.3e}"]
    )


def _soup(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, {}, ("runs", "out"), __doc__ or "")
    runs = [Path(run) for run in _items(arguments["runs"])]
    from vlmpeft.adapter_soup import soup
    from vlmpeft.conversion import free_directory

    out = free_directory(arguments["out"])
    soup(runs, out)
    print(f"{out} (the mean of {len(runs)} runs)")


def _items(text: str) -> list[str]:
    """`[a,b]` as a list."""
    return [item.strip() for item in text.strip().removeprefix("[").removesuffix("]").split(",") if item.strip()]


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError("C102", f"{key}={text}: expected a number.") from None


def _integer(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError("C102", f"{key}={text}: expected an integer.")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_command(main))
