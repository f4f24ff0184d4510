"""Prove a run right before it starts: every key of `train`, and nothing is left in run.dir.

python -m vlmpeft.doctor recipe=NAME [section.key=value ...] [--json]

One line a check: ok, note, or FAIL with where and how to mend it. The exit status is that of the first failure:
2 recipe, 3 data, 4 model, 5 checkpoint or disk, 6 machine, 7 numbers. A few steps are taken on one batch, with the
memory that training takes. `vlmpeft train --help` lists the keys.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from vlmpeft.config import load_recipe
from vlmpeft.errors import ConfigError, run_command
from vlmpeft.findings import Findings

JSON = "--json"


def main(argv: Sequence[str]) -> int:
    """Examine a run. Returns: 0, or the exit status of the first failed check."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    names = [a.removeprefix("recipe=") for a in argv if a.startswith("recipe=")]
    if not names:
        raise ConfigError("C106", "recipe is not set.", "write recipe=NAME or a YAML file, as for train.")
    recipe = load_recipe(names[-1], [a for a in argv if not a.startswith("recipe=") and a != JSON])
    from vlmpeft.doctor_run import Examination  # what trains loads only when the command line has proved right

    quiet = JSON in argv
    found = Findings((lambda _: None) if quiet else (lambda line: print(line, flush=True)))
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        Examination(recipe, found).run()
    print(json.dumps(found.plain(), indent=1, ensure_ascii=False) if quiet else found.summary())
    return found.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
