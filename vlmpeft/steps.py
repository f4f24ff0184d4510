"""What happens around every optimizer step besides it: schedules, budgets, and penalties that are no part of the loss.

In `vlmpeft.train` all of it happens by itself. A loop of one's own calls it so:

    steps = Steps(tuned, total)
    for step in range(total):
        steps.before(step)
        model(**batch).loss.backward()  # once or for several micro-batches
        steps.add_gradients()
        optimizer.step()
        steps.after(step)
        optimizer.zero_grad()

Most tuners need none of it; `needed` says which do.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlmpeft.drift import Drift
from vlmpeft.errors import EnvironmentFault
from vlmpeft.tune import Tuned
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import AfterStep, BeforeStep, Penalised

DRIFT = "drift"


class Steps:
    """The steps of one stage.

    Args:
        total: optimizer steps of the stage.
        l2_sp: strength of the pull towards the starting weights, 0 for none; see `drift`.
        processes, sharded: how many train together, and whether each holds a piece of every tensor.

    Raises: EnvironmentFault E434 for a tuner that several processes cannot follow.
    """

    def __init__(self, tuned: Tuned, total: int, l2_sp: float = 0.0, processes: int = 1, sharded: bool = False) -> None:
        self.tuned, self.total = tuned, total
        for name in needed(tuned):
            self._refuse(name, processes, sharded)
        self.drift = Drift(tuned, l2_sp) if l2_sp else None
        self.layers = {name: self._layers(name) for name in needed(tuned)}
        tuners = {name: tuned.applied[name].tuner for name in self.layers}
        started = {k: t.start_state(self.layers[k]) for k, t in tuners.items() if isinstance(t, AfterStep)}
        self.states: dict[str, dict[str, Tensor]] = started

    def _refuse(self, name: str, processes: int, sharded: bool) -> None:
        tuner = self.tuned.applied[name].tuner
        if sharded and not isinstance(tuner, BeforeStep):
            message = f"tuner '{name}' ({tuner.kind}) compares whole tensors, which FSDP2 cuts apart."
            raise EnvironmentFault("E434", message, "launch with recipes/launch/ddp.yaml.")
        if processes > 1 and isinstance(tuner, BeforeStep):
            message = f"tuner '{name}' ({tuner.kind}) trains more and more weights."
            raise EnvironmentFault("E434", message, "train in one process, or use a tuner of kind layers.")

    def _layers(self, name: str) -> dict[str, Attachment]:
        """What a tuner has put into the model, by path."""
        ours = {id(p) for p in self.tuned.applied[name].parameters.values()}
        found = [(path, m) for path, m in self.tuned.model.named_modules() if isinstance(m, Attachment)]
        return {path: m for path, m in found if ours & {id(p) for p in m.own_parameters().values()}}

    def before(self, step: int) -> None:
        """Before the forwards of a step. Args: step: from 0."""
        for name in self.layers:
            tuner = self.tuned.applied[name].tuner
            if isinstance(tuner, BeforeStep):
                tuner.before_step(self.tuned.parts, step)

    def add_gradients(self) -> dict[str, Tensor]:
        """Once the gradients of all micro-batches are there, before they are clipped. Returns: penalties by name."""
        penalties = {} if self.drift is None else {DRIFT: self.drift.add_gradient()}
        for name, layers in self.layers.items():
            tuner = self.tuned.applied[name].tuner
            if isinstance(tuner, Penalised):
                penalties[f"{name}_penalty"] = tuner.add_gradients(layers)
        return penalties

    def after(self, step: int) -> dict[str, float]:
        """After the optimizer's step, before gradients go. Returns: numbers for the log, by name."""
        found: dict[str, float] = {}
        for name, state in self.states.items():
            tuner = self.tuned.applied[name].tuner
            if isinstance(tuner, AfterStep):
                told = tuner.after_step(self.layers[name], state, step, self.total)
                found |= {f"{name}_{key}": value for key, value in told.items()}
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name; what `load` takes."""
        drift = {} if self.drift is None else self.drift.start
        states = {f"{name}|{key}": value for name, state in self.states.items() for key, value in state.items()}
        return {**{f"{DRIFT}|{key}": value for key, value in drift.items()}, **states}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave: names and shapes must be those it gives here."""
        found = {key: tensors[key] for key in self.tensors()}
        if self.drift is not None:
            self.drift.start = {key: found[f"{DRIFT}|{key}"] for key in self.drift.start}
        for name, state in self.states.items():
            self.states[name] = {key: found[f"{name}|{key}"] for key in state}


def needed(tuned: Tuned) -> list[str]:
    """The tuners at work that act around steps, by name."""
    kinds = (BeforeStep, Penalised, AfterStep)
    return [name for name in sorted(tuned.active) if isinstance(tuned.applied[name].tuner, kinds)]
