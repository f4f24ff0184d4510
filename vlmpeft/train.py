"""Train one stage, or all stages of a recipe.

python -m vlmpeft.train recipe=NAME [section.key=value ...]
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmpeft.config import load_recipe, recipe_names, to_yaml
from vlmpeft.errors import ConfigError, run_command
from vlmpeft.parts import table_text
from vlmpeft.projectors import PROJECTORS
from vlmpeft.recipe import Recipe, Stage
from vlmpeft.tuners import TUNERS

USAGE = """
  --show   print the resolved recipe: every key with its value, and nothing else
  --debug  print tracebacks

Often set: data.pretrain=FILE data.instruct=FILE data.images=DIR run.dir=DIR
  vision=NAME language=NAME projector=NAME eval.questions=FILE run.resume=auto|never|DIR run.overwrite=true
  run.dry_run=true prints what would train, from config.json files alone: no weights, no data

Keys with their defaults; a recipe sets some of them (--show prints what it sets). In a recipe with stages, the keys
of a stage are written stages.NAME.key. Lists are written [a,b]; null stands for nothing.
"""


def _help() -> str:
    lines = [f"  {key}" for key in settings()]
    return f"{__doc__}\nRecipes: {', '.join(recipe_names())}, or a YAML file.\n{USAGE}" + "\n".join(lines)


def settings() -> Iterator[str]:
    """Every key of a recipe as `section.key=default`, a choice with what it may be."""
    hints = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name == "projector":
            yield "projector.name=mlp2x_gelu"
            for name in PROJECTORS:
                for option, parameter in PROJECTORS.options(name).items():
                    yield f"projector.{option}={_value(parameter.default)}  with projector.name={name}"
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from _section(hints[field.name], f"{field.name}.")
        elif field.name != "stages":
            yield f"{field.name}={_value(field.default)}"
    yield from _section(Stage, "")
    for kind in TUNERS:
        yield from _section(TUNERS.get(kind), f"{kind}.")


def _section(cls: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _section(hints[field.name], f"{prefix}{field.name}.")
        elif field.name != "tuners":
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            hint = hints[field.name]
            choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
            shown = "...  required" if required else _value(field.default)
            yield f"{prefix}{field.name}={shown}" + (f"  of {'|'.join(map(str, choices))}" if choices else "")


def _value(default: object) -> str:
    """A default as it is typed on the command line."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, tuple | list):
        return f"[{','.join(map(_value, default))}]"
    return str(default).replace("\n", "\\n")


def main(argv: Sequence[str]) -> int:
    """Run the command line. Returns: 0, or 143 after SIGTERM with the state saved."""
    if "--help" in argv or "-h" in argv:
        print(_help())
        return 0
    names = [a.removeprefix("recipe=") for a in argv if a.startswith("recipe=")]
    if not names:
        known = ", ".join(recipe_names())
        raise ConfigError("C106", "recipe is not set.", f"write recipe=NAME, one of: {known}, or a YAML file.")
    recipe = load_recipe(names[-1], [a for a in argv if not a.startswith("recipe=") and a != "--show"])
    if "--show" in argv:
        print(to_yaml(recipe), end="")
        return 0
    if recipe.run.dry_run:
        from vlmpeft.build import dry_run, dry_weights

        print("\n\n".join(table_text(stage, rows) for stage, rows in dry_run(recipe).items()))
        if recipe.quant.bits:
            print(f"\n{dry_weights(recipe).line()}")
        return 0
    from vlmpeft.run import Run  # the loop and what it needs load only when the command line has proved right

    return Run(recipe, Path(recipe.run.dir)).run()


if __name__ == "__main__":
    sys.exit(run_command(main))
