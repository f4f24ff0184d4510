"""Whether what a run would save is what it trained, and whether the disk holds all that it would write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlmpeft.batch import Batch
from vlmpeft.build import Bundle
from vlmpeft.errors import CheckpointError
from vlmpeft.recipe import Recipe
from vlmpeft.stage import total_steps

CLOSE = 1e-3  # of the largest logit: what other kernels may round otherwise


@torch.no_grad()
def logits_of_batch(bundle: Bundle, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Logits at the supervised positions of a batch, (m, vocabulary), without dropout and on the CPU."""
    bundle.model.eval()
    device = bundle.model.language.get_input_embeddings().weight.device
    with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
        logits: Tensor = bundle.model(**batch.to(device).inputs()).logits
    return logits.float().cpu()


def compare_logits(before: Tensor, after: Tensor, where: Path) -> str:
    """What two logits of one batch have in common. Raises: CheckpointError K208 if they are not those of one model."""
    if torch.equal(before, after):
        return "equal logits, bit for bit"
    off = float((before - after).abs().max() / before.abs().max())
    if not off <= CLOSE:
        message = f"{where} loads, but its logits are {off:.2g} of the largest one away from those that were saved."
        raise CheckpointError("K208", message, "something trained is not saved, or is not what it was when it loads.")
    return f"equal logits up to rounding ({off:.1g} of the largest)"


def size_of(directory: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Writes:
    """Bytes that a run writes. Args: model: of a model directory. checkpoint: with optimizer. most: at one time."""

    model: int
    checkpoint: int
    most: int


def writes_of(recipe: Recipe, samples: Mapping[str, int], model: int, optimizer: int) -> Writes:
    """What a run writes, from the largest stage's sizes.

    Args: samples: of an epoch, by stage. model, optimizer: bytes of a model directory and of an optimizer's state.
    """
    saves = len(recipe.stages)
    if every := recipe.run.save_every:
        saves += sum(total_steps(recipe.stages[name], count) // every for name, count in samples.items())
    kept = min(saves, recipe.run.keep + 2)  # the best one besides, and one in the making
    return Writes(model, model + optimizer, kept * (model + optimizer) + model)
