"""Show samples as the model sees them, with the tokens that are trained, and count those of the whole file.

python -m vlmpeft.inspect recipe=NAME data.instruct=FILE data.images=DIR [n=3] [start=1] [stage=NAME] [key=value ...]
python -m vlmpeft.inspect tokenizer=NAME data=FILE images=DIR [template=vicuna_v1] [image_tokens=576] [n=3]

Only the tokenizer and config.json files are read, no weights. Supervised tokens are green, or stand in [[ ]] where
the output is no terminal or NO_COLOR is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vlmpeft.config import load_recipe
from vlmpeft.data_config import DataConfig, DataFile, require_folders
from vlmpeft.errors import ConfigError, nearest, run_command
from vlmpeft.eval.runner import parse_arguments
from vlmpeft.language import load_tokenizer
from vlmpeft.prepare import open_store
from vlmpeft.recipe import Recipe
from vlmpeft.record_encoder import Preparation
from vlmpeft.sample_text import sample_text, totals_text
from vlmpeft.template import TurnEncoder

OWN = {"n": 3, "start": 1}  # samples shown, and the first of them
BARE = {"images": "", "template": "vicuna_v1", "system": "", "image_tokens": 576, "max_length": 2048, **OWN}


def main(argv: Sequence[str]) -> None:
    """Print samples and totals of every file."""
    names = [a.removeprefix("recipe=") for a in argv if a.startswith("recipe=")]
    if not names:
        values = parse_arguments(argv, BARE, ("tokenizer", "data"), __doc__ or "")
        files: tuple[DataFile, ...] = (DataFile(values["data"]),)
        require_folders(values["images"], files)
        encoder = TurnEncoder(
            load_tokenizer(values["tokenizer"]), values["template"], values["image_tokens"], values["system"] or None
        )
        config = DataConfig(images=values["images"] or None, max_length=values["max_length"], duplicate_ids="keep")
        return _show(files, Preparation(config, encoder), values["n"], values["start"])
    own = [a for a in argv if a.partition("=")[0] in (*OWN, "stage")]
    values = parse_arguments(own, {**OWN, "stage": ""}, (), __doc__ or "")
    recipe = load_recipe(names[-1], [a for a in argv if a not in own and not a.startswith("recipe=")])
    stage = _stage(recipe, values["stage"])
    from vlmpeft.build import empty_bundle
    from vlmpeft.images import ImageReader
    from vlmpeft.preflight import preparation

    files = recipe.data.files(recipe.stages[stage].source)
    if not files:
        key = f"data.{recipe.stages[stage].source}"
        raise ConfigError("C106", f"stage {stage} reads {key}, which is not set.", f"write {key}=FILE data.images=DIR.")
    require_folders(recipe.data.images, files)
    bundle = empty_bundle(recipe)
    return _show(files, preparation(bundle, stage, ImageReader(bundle.image_transform)), values["n"], values["start"])


def _stage(recipe: Recipe, asked: str) -> str:
    """The stage asked for, or the last one that has data."""
    if asked and asked not in recipe.stages:
        raise ConfigError("C101", f"no stage '{asked}'{nearest(asked, recipe.stages)}")
    ready = [name for name, stage in recipe.stages.items() if recipe.data.files(stage.source)]
    return asked or [*recipe.stages, *ready][-1]


def _show(files: Sequence[DataFile], how: Preparation, n: int, start: int) -> None:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for file in files:
        store = open_store(file, how)
        for index in range(start - 1, min(start - 1 + n, len(store))):
            print(f"sample {index + 1} {sample_text(store[index], how.encoder.tokenizer, colour)}\n")
        faults = list(store.faults().values())
        print(f"{file.path}: {totals_text(store.lengths, store.supervised, store.pictures, faults)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
