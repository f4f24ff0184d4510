"""Memory and floating-point operations of a run before it starts, from config.json files alone: no weights.

python -m vlmpeft.plan recipe=NAME [fit=24GiB] [length=TOKENS] [section.key=value ...] [--json]

fit: the memory of a device; the recipe is tried as it is, then with forwards of half as many samples, with gradient
checkpointing, AdamW in 8 bits, quant.bits=8 and 4, and the keys that make it fit are printed. length: tokens of the
samples; data.max_length if it is left out. Every key of `train` is taken.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from vlmpeft.config import load_recipe
from vlmpeft.errors import ConfigError, run_command
from vlmpeft.recipe import Recipe

JSON = "--json"
OWN = ("recipe", "fit", "length")


def main(argv: Sequence[str]) -> int:
    """Print the plan of every stage. Returns: 0."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    own = dict(a.split("=", 1) for a in argv if a.partition("=")[0] in OWN and "=" in a)
    overrides = [a for a in argv if a.partition("=")[0] not in OWN and a != JSON]
    if "recipe" not in own:
        raise ConfigError("C106", "recipe is not set.", "write recipe=NAME or a YAML file, as for train.")
    length = own.get("length")
    if length is not None and not length.isdigit():
        raise ConfigError("C102", f"length={length} is no number of tokens.", "write for example length=1024.")
    recipe = load_recipe(own["recipe"], overrides)
    from vlmpeft.memory_plan import plan_stage
    from vlmpeft.plan_fit import fit, parse_size
    from vlmpeft.plan_text import HONEST, plan_text, plan_values

    tokens, keys = None if length is None else int(length), list[str]()
    if "fit" in own:
        plans, keys = fit(recipe, parse_size(own["fit"]), tokens, _prefixes(recipe, own["recipe"], overrides))
        recipe = load_recipe(own["recipe"], [*overrides, *keys])
    else:
        plans = {name: plan_stage(recipe, name, tokens) for name in recipe.stages}
    known = {name: _data(recipe, name) for name in recipe.stages}
    if JSON in argv:
        stages = {name: plan_values(recipe, name, plan, known[name]) for name, plan in plans.items()}
        print(json.dumps({"overrides": keys, "stages": stages}, indent=1))
        return 0
    print("\n\n".join(plan_text(recipe, name, plan, known[name]) for name, plan in plans.items()))
    print(f"\n{HONEST}")
    if "fit" in own:
        print(f"fits into {own['fit']}: {' '.join(keys) or 'as it is'}")
    return 0


def _prefixes(recipe: Recipe, name: str, overrides: Sequence[str]) -> dict[str, str]:
    """What the keys of each stage begin with: nothing in a recipe that describes its only stage itself."""
    with contextlib.suppress(ConfigError):
        load_recipe(name, [*overrides, "batch.micro=1"])
        return dict.fromkeys(recipe.stages, "")
    return {stage: f"stages.{stage}." for stage in recipe.stages}


def _data(recipe: Recipe, name: str) -> tuple[int, int] | None:
    """Samples of an epoch of a stage and their tokens; None where no data is set. Raises: DataError."""
    if not recipe.data.files(recipe.stages[name].source):
        return None
    from vlmpeft.build import empty_bundle
    from vlmpeft.images import ImageReader
    from vlmpeft.preflight import prepare_stage
    from vlmpeft.sampling import epoch_size

    bundle = empty_bundle(recipe)
    found = prepare_stage(bundle, name, ImageReader(bundle.image_transform), None, lambda _: None).samples
    samples = epoch_size(found.shares)
    return samples, round(sum(found.lengths) * samples / len(found))


if __name__ == "__main__":
    sys.exit(run_command(main))
