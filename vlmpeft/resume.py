"""Checkpoints of a run: a model directory with the optimizer and the position, which a run goes on from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmpeft import fs
from vlmpeft.build import Bundle
from vlmpeft.checkpoint import save
from vlmpeft.errors import CheckpointError
from vlmpeft.manifest import verify
from vlmpeft.optim import restored
from vlmpeft.sharding import gathered, like, whole
from vlmpeft.steps import Steps
from vlmpeft.weights import read_strict

OPTIMIZER = "optimizer.safetensors"
STEPS = "steps.safetensors"  # what steps depend on besides: budgets, what L2-SP measures the drift from
STATE = "state.json"


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name and entry, for safetensors: no pickle. Every process must call this."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                whole_value = gathered(value) if isinstance(value, Tensor) else torch.tensor(value)
                shared = key.startswith("qmap")  # bitsandbytes' tables are those of all parameters; files want copies
                tensors[f"{name}|{key}"] = whole_value.clone() if shared else whole_value
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """The inverse of `optimizer_state`. Raises: CheckpointError K204 if the state is of other parameters."""
    from safetensors.torch import load_file

    path = directory / OPTIMIZER
    names = {n: p for g in optimizer.param_groups for n, p in zip(g["parameter_names"], g["params"], strict=True)}
    for key, tensor in load_file(path).items():
        name, _, entry = key.rpartition("|")
        if name not in names:
            message = f"{path} holds state of '{name}', which does not train here."
            raise CheckpointError("K204", message, "resume with the recipe of the run.")
        parameter = names[name]
        value = tensor if entry == "step" else like(tensor, parameter)
        optimizer.state[parameter][entry] = restored(optimizer, parameter, entry, value)


def checkpoint_bytes(bundle: Bundle) -> int:
    """About what a checkpoint of the current stage takes: what is tuned, and two moments of what trains."""
    trained = sum(p.numel() * p.element_size() for p in bundle.tuned.trainable().values())
    return 3 * trained


def load_steps(steps: Steps, directory: Path) -> None:
    """Bring back what `Steps.tensors` gave. Raises: ModelError M502 if it is of other tuners or parameters."""
    expected = steps.tensors()
    if expected:
        values = read_strict(directory / STEPS, expected)
        steps.load({name: like(values[name], tensor) for name, tensor in expected.items()})


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands.

    Args:
        stage: index of the stage; the number of stages once all are trained.
        step: optimizer steps done in the stage.
        total: those of all stages together.
        evaluated: whether the held-out evaluation due at this step is done.
        best_loss, best_figure, best_step: of the stage's best evaluation; the step is a total.
        bad_evals: evaluations of the stage since then.
        loss: of the last step.
        seconds: spent in the stage.
        processes: how many trained up to here.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    evaluated: bool = True
    best_loss: float | None = None
    best_figure: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    loss: float | None = None
    seconds: float = 0.0
    processes: int = 1

    def judged(self, loss: float | None, figure: float | None) -> Position:
        """The position after an evaluation here: the best so far by its figure if it has one, else by its loss."""
        lower, higher = (None if figure is not None else loss), figure
        improved = (lower is not None and (self.best_loss is None or lower < self.best_loss)) or (
            higher is not None and (self.best_figure is None or higher > self.best_figure)
        )
        if not improved:
            return dataclasses.replace(self, evaluated=True, bad_evals=self.bad_evals + 1)
        return dataclasses.replace(
            self, evaluated=True, best_loss=loss, best_figure=figure, best_step=self.total, bad_evals=0
        )


def position_of(directory: Path) -> Position:
    """The position a checkpoint was written at."""
    return Position(**json.loads((directory / STATE).read_text(encoding="utf-8")))


def step_directory(run_dir: Path, total: int) -> Path:
    """Where the checkpoint after `total` optimizer steps of all stages lies."""
    return run_dir / "checkpoints" / f"step-{total}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, whether or not they verify."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_number)


def _number(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def save_checkpoint(
    bundle: Bundle,
    run_dir: Path,
    position: Position,
    optimizer: torch.optim.Optimizer | None,
    keep: int,
    facts: Mapping[str, Any],
    steps: Steps | None = None,
    main: bool = True,
) -> Path:
    """Write `checkpoints/step-N`, then drop the oldest beyond `keep` (the best is never dropped).

    Later ones go too: they are damaged, or belong to a training that was taken up again from an earlier step.
    Args: main: whether this process writes; every process must call this, as a sharded model is gathered.
    """
    target = step_directory(run_dir, position.total)
    state = {} if optimizer is None else {OPTIMIZER: optimizer_state(optimizer)}
    if steps is not None and (tensors := steps.tensors()):
        state[STEPS] = {name: gathered(tensor) for name, tensor in tensors.items()}

    def extra(directory: Path) -> dict[str, Any]:
        for name, tensors in state.items():
            fs.write_tensors(directory / name, tensors)
        fs.write_json(directory / STATE, dataclasses.asdict(position))
        return {"facts": dict(facts)}

    with whole(bundle.tuned):
        if main:
            save(bundle, target, extra)
            _drop(run_dir, position, keep)
    return target


def _drop(run_dir: Path, position: Position, keep: int) -> None:
    """Remove the checkpoints that `save_checkpoint` does not keep."""
    found = checkpoints(run_dir)
    past = [p for p in found if _number(p) <= position.total]
    for old in set(found) - {*past[-keep:], *(p for p in past if _number(p) == position.best_step)}:
        fs.remove(old)


def newest_valid(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files verify, and why newer ones were passed over."""
    rejected: list[str] = []
    for path in reversed(checkpoints(run_dir)):
        try:
            verify(path)
            return path, rejected
        except CheckpointError as error:
            rejected.append(error.line())
    return None, rejected
