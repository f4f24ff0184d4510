"""LMAR and visual mass of fixed samples while a stage trains: before its first step, every so many, and at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vlmpeft.build import Bundle
from vlmpeft.data import Samples, load_batches
from vlmpeft.forward import loss_of
from vlmpeft.mixture import Mixture
from vlmpeft.recipe import Stage
from vlmpeft.stage import StageData
from vlmpeft.steering import lmar
from vlmpeft.steering.statistics import numbers

if TYPE_CHECKING:
    from accelerate import Accelerator


class Diagnosis:
    """Reads the attention of one stage; every process reads the same samples, for a sharded model needs them all.

    Args: log: takes a row: `lmar` (l,) against the prompt's text, where the template has one; `visual_mass` (l,).
    """

    def __init__(
        self, bundle: Bundle, stage: Stage, data: StageData, accelerator: Accelerator, log: Callable[..., None]
    ) -> None:
        self.bundle, self.stage, self.accelerator, self.log = bundle, stage, accelerator, log
        self.every = bundle.recipe.diagnose.every
        source = data.held_out if any(data.held_out.pictures) else data.train
        self.samples = Samples(source, data.load)
        self.chosen = evenly(source, bundle.recipe.diagnose.samples) if self.every else []

    def __call__(self, model: Any, step: int, last: bool = False) -> None:
        """Read and log if it is time. Args: step: optimizer steps done. last: the stage is over."""
        if self.chosen and (last or step % self.every == 0):
            self.log(**self.read(model))

    @torch.no_grad()
    def read(self, model: Any) -> dict[str, Any]:
        """The row of the model as it is. Raises: ModelError M561 if its attention is not PyTorch's own."""
        model.eval()
        micro = self.stage.batch.micro
        batches = [self.chosen[i : i + micro] for i in range(0, len(self.chosen), micro)]
        with lmar(self.bundle.model, self.bundle.parts, text_scope="prompt") as probe:
            for loaded in load_batches(self.samples, batches, workers=0):
                loss_of(self.accelerator, model, loaded, 1)
        row: dict[str, Any] = {"visual_mass": numbers(probe.mass())}
        if self.stage.template != "plain":  # there a beginning of sequence would be all the text
            row["lmar"] = numbers(probe.per_sample().nanmean(0))
        return row


def evenly(samples: Mixture, count: int) -> list[int]:
    """At most `count` indices of samples with images, evenly spread."""
    shown = [i for i, pictures in enumerate(samples.pictures) if pictures]
    count = min(count, len(shown))
    return [shown[i * len(shown) // count] for i in range(count)]
