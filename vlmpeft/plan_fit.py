"""The first change of a recipe under which it fits into a memory, the least loss of speed first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlmpeft.errors import ConfigError, EnvironmentFault, ModelError
from vlmpeft.memory_plan import StageMemory, plan_stage
from vlmpeft.recipe import Recipe, Stage

UNITS = {"MiB": 2**20, "MB": 10**6, "GiB": 2**30, "GB": 10**9, "TiB": 2**40, "TB": 10**12}
Fitted = tuple[dict[str, StageMemory], list[str]]


def parse_size(text: str) -> int:
    """Bytes of a size such as 24GiB. Raises: ConfigError C102."""
    for unit, factor in UNITS.items():
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit():
            return int(float(number) * factor)
    raise ConfigError("C102", f"fit={text} is no size.", f"write for example fit=24GiB (known: {', '.join(UNITS)}).")


@dataclass(frozen=True)
class Change:
    """What of a stage is changed, as `key=value` below the stage."""

    stage: Stage
    keys: tuple[str, ...]


def changes(stage: Stage) -> Iterator[Change]:
    """The stage as it is, then with gradient checkpointing, then with AdamW's moments in 8 bits besides."""
    keys: tuple[str, ...] = ()
    yield Change(stage, keys)
    if not stage.gradient_checkpointing:
        stage, keys = dataclasses.replace(stage, gradient_checkpointing=True), ("gradient_checkpointing=true",)
        yield Change(stage, keys)
    if not stage.optim.name.endswith("8bit"):
        optim = dataclasses.replace(stage.optim, name="adamw8bit")
        yield Change(dataclasses.replace(stage, optim=optim), (*keys, "optim.name=adamw8bit"))


def fit(recipe: Recipe, room: int, length: int | None, prefixes: Mapping[str, str]) -> Fitted:
    """Plans under which every stage fits, and the overrides that bring them about.

    Args: room: bytes. prefixes: what a stage's keys begin with on the command line.
    Raises: EnvironmentFault E402 if nothing helps, with the least that is needed.
    """
    least: dict[str, int] = {}
    for bits in dict.fromkeys((recipe.quant.bits, 8, 4)):
        if recipe.quant.bits is not None and bits is not None and bits > recipe.quant.bits:
            continue
        quant = dataclasses.replace(recipe.quant, bits=bits)
        overrides = [] if bits == recipe.quant.bits else [f"quant.bits={bits}"]
        plans: dict[str, StageMemory] = {}
        for name in recipe.stages:
            found = _fit_stage(dataclasses.replace(recipe, quant=quant), name, room, length, least)
            if found is None:
                break
            plans[name], keys = found
            overrides += [prefixes[name] + key for key in keys]
        else:
            return plans, overrides
    worst = max(least, key=lambda name: least[name])
    message = f"stage {worst} needs {least[worst] / 2**30:.1f} GiB at the least, fit is {room / 2**30:.1f} GiB."
    raise EnvironmentFault("E402", message, "train less (lora in place of full), shorter samples, or more memory.")


def _fit_stage(
    recipe: Recipe, name: str, room: int, length: int | None, least: dict[str, int]
) -> tuple[StageMemory, tuple[str, ...]] | None:
    """The first change of a stage that fits. Args: least: takes the least that any needs, by stage."""
    for change in changes(recipe.stages[name]):
        changed = dataclasses.replace(recipe, stages={**recipe.stages, name: change.stage})
        try:
            plan = plan_stage(changed, name, length)
        except ModelError as error:
            if error.code == "M559":  # what trains in full cannot lie in few bits
                return None
            raise
        batch = change.stage.batch.micro
        while batch >= 1:
            now = plan.with_batch(batch)
            least[name] = min(least.get(name, now.needed), now.needed)
            if now.needed <= room:
                halved = (f"batch.micro={batch}",) if batch < change.stage.batch.micro else ()
                return now, (*change.keys, *halved)
            batch //= 2
    return None
