"""Train one stage, or all stages of a recipe.

python -m vlmpeft.train recipe=NAME [section.key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vlmpeft.config import load_recipe, recipe_names, to_yaml
from vlmpeft.errors import ConfigError, run_command


def _help() -> str:
    return (
        f"{__doc__}\nRecipes: {', '.join(recipe_names())}, or a YAML file.\n"
        "  --show   print the resolved recipe: every key with its value, and nothing else\n"
        "  --debug  print tracebacks\n\nOften set: data.pretrain=FILE data.instruct=FILE data.images=DIR run.dir=DIR\n"
        "  vision=NAME language=NAME projector=NAME eval.questions=FILE run.resume=auto|never|DIR run.overwrite=true"
    )


def main(argv: Sequence[str]) -> int:
    """Run the command line. Returns: 0, or 143 after SIGTERM with the state saved."""
    if "--help" in argv or "-h" in argv:
        print(_help())
        return 0
    names = [a.removeprefix("recipe=") for a in argv if a.startswith("recipe=")]
    if not names:
        raise ConfigError("C106", "recipe is not set.", f"write recipe=NAME, one of: {', '.join(recipe_names())}, or a YAML file.")
    recipe = load_recipe(names[-1], [a for a in argv if not a.startswith("recipe=") and a != "--show"])
    if "--show" in argv:
        print(to_yaml(recipe), end="")
        return 0
    from vlmpeft.run import Run  # torch loads only now, when the command line has proved right

    return Run(recipe, Path(recipe.run.dir)).run()


if __name__ == "__main__":
    sys.exit(run_command(main))
