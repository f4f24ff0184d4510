"""How the loop runs a model: loss of a forward, loss on held-out samples, activations kept or computed again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmpeft.data import Loaded, Samples, load_batches, micro_batches
from vlmpeft.distributed import total
from vlmpeft.stage import StageData
from vlmpeft.tune import Tuned
from vlmpeft.tuners.base import Calibrated


def loss_of(accelerator: Accelerator, model: Any, loaded: Loaded, divisor: int) -> Tensor:
    """The summed loss of a batch divided by `divisor`, in the run's precision."""
    with accelerator.autocast():
        loss: Tensor = model(**loaded.batch.to(accelerator.device).inputs(), num_items_in_batch=divisor).loss
    return loss


def calibrate(accelerator: Accelerator, tuned: Tuned, data: StageData, seed: int) -> None:
    """Show tuners that must see samples before they train some of a stage's, drawn by `seed`, unless they have."""
    for name in sorted(tuned.active):
        tuner = tuned.applied[name].tuner
        if isinstance(tuner, Calibrated) and not tuner.is_calibrated(tuned.model, tuned.parts):
            drawn = random.Random(seed).sample(range(len(data.train)), min(tuner.samples, len(data.train)))
            batches = load_batches(Samples(data.train, data.load), [[index] for index in drawn], data.workers)
            losses = (loss_of(accelerator, tuned.model, loaded, 1) for loaded in batches)
            tuner.calibrate(tuned.model, tuned.parts, losses)


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator, model: Any, data: StageData, micro: int, stopping: Callable[[], bool]
) -> float | None:
    """Loss per supervised token over the held-out samples, which the processes share; None once `stopping` says so."""
    model.eval()
    order = sorted(range(len(data.held_out)), key=lambda i: data.held_out.lengths[i])
    forwards = micro_batches(order, micro, accelerator.process_index, accelerator.num_processes)
    summed, count = torch.zeros((), device=accelerator.device), 0
    for loaded in load_batches(Samples(data.held_out, data.load), forwards, data.workers):
        if stopping():
            return None
        summed += loss_of(accelerator, model, loaded, 1)
        count += loaded.batch.num_supervised
    return total(accelerator, summed) / total(accelerator, count)


def checkpoint_activations(language: Any, on: bool) -> None:
    """Recompute the blocks' activations in backward, or not."""
    renamed = hasattr(language, "activation_checkpointing_enable")  # in transformers 5.23
    prefix = "activation" if renamed else "gradient"
    if on:
        getattr(language, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(language, f"{prefix}_checkpointing_disable")()
