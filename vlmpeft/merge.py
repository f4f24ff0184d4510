"""Fold the adapters of a model directory into its weights.

python -m vlmpeft.merge model=runs/mine/final out=mine-merged

The result is a model directory as any other, without adapters: the language model lies in it as a directory that
transformers reads, `out/language`. dtype: of its weights: fp32, bf16 or fp16.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlmpeft.errors import run_command
from vlmpeft.eval.runner import parse_arguments

if TYPE_CHECKING:
    from vlmpeft.build import Bundle

DEFAULTS = {"dtype": "fp32"}


def main(argv: Sequence[str]) -> None:
    """Merge and say where the result is."""
    arguments = parse_arguments(argv, DEFAULTS, ("model", "out"), __doc__ or "")
    from vlmpeft.conversion import free_directory, open_model

    out = free_directory(arguments["out"])
    write_merged(open_model(arguments["model"], arguments["dtype"]), out)
    print(f"{out} ({arguments['dtype']})")


def write_merged(bundle: Bundle, target: Path) -> None:
    """Merge a bundle's adapters, in place, and write it as a model directory whose manifest points to its own weights.

    What was trained of the encoder is written whole, as if it had been fully tuned.
    Raises: ModelError M555 for an adapter on a tied weight.
    """
    from vlmpeft.checkpoint import MERGED, save

    saw = any(one.tuner.part == "vision" for one in bundle.tuned.applied.values())
    bundle.tuned.merge_and_unload()
    merged = _without_tuners(bundle, target / MERGED, saw)

    def write_language(directory: Path) -> dict[str, Any]:
        language = cast(Any, merged.model.language)
        language.save_pretrained(directory / MERGED)
        merged.tokenizer.save_pretrained(directory / MERGED)
        return {}

    save(merged, target, write_language)


def _without_tuners(bundle: Bundle, language: Path, saw: bool) -> Bundle:
    """The same model over the merged language model at `language`; its recipe tunes nothing, or the encoder alone."""
    from vlmpeft.language import fingerprint
    from vlmpeft.tune import Tuned
    from vlmpeft.tuners import Full

    stage = dataclasses.replace(bundle.stage, tuners={"vision": Full("vision")} if saw else {})
    recipe = dataclasses.replace(
        bundle.recipe,
        language=dataclasses.replace(bundle.recipe.language, name=str(language)),
        stages={name: stage for name, old in bundle.recipe.stages.items() if old == bundle.stage},
        init=None,
    )
    tuned = Tuned(bundle.model, bundle.model.parts)
    tuned.apply(stage.tuners)
    prints = {**bundle.fingerprints, "language": fingerprint(bundle.model.language)}
    return dataclasses.replace(bundle, tuned=tuned, recipe=recipe, stage=stage, fingerprints=prints)


if __name__ == "__main__":
    sys.exit(run_command(main))
