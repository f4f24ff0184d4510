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

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


def save_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Optimizer state as safetensors, keyed by parameter name: no pickle."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    fs.write_tensors(directory / OPTIMIZER, tensors)


def load_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """The inverse of `save_optimizer`. Raises: CheckpointError K204 if the state is of other parameters."""
    from safetensors.torch import load_file

    path = directory / OPTIMIZER
    names = {n: p for g in optimizer.param_groups for n, p in zip(g["parameter_names"], g["params"], strict=True)}
    for key, tensor in load_file(path).items():
        name, _, entry = key.rpartition("|")
        if name not in names:
            message = f"{path} holds state of '{name}', which does not train here."
            raise CheckpointError("K204", message, "resume with the recipe of the run.")
        parameter = names[name]
        optimizer.state[parameter][entry] = tensor if entry == "step" else tensor.to(parameter.device)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands.

    Args:
        stage: index of the stage; the number of stages once all are trained.
        step: optimizer steps done in the stage.
        total: those of all stages together.
        evaluated: whether the held-out evaluation due at this step is done.
        best_loss, best_step: of the stage's best evaluation; the step is a total.
        bad_evals: evaluations of the stage since then.
        loss: of the last step.
        seconds: spent in the stage.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    evaluated: bool = True
    best_loss: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    loss: float | None = None
    seconds: float = 0.0


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
) -> Path:
    """Write `checkpoints/step-N`, then drop the oldest beyond `keep` (the best is never dropped).

    Later ones go too: they are damaged, or belong to a training that was taken up again from an earlier step.
    """
    target = step_directory(run_dir, position.total)

    def extra(directory: Path) -> dict[str, Any]:
        if optimizer is not None:
            save_optimizer(optimizer, directory)
        fs.write_json(directory / STATE, dataclasses.asdict(position))
        return {"facts": dict(facts)}

    save(bundle, target, extra)
    found = checkpoints(run_dir)
    past = [p for p in found if _number(p) <= position.total]
    for old in set(found) - {*past[-keep:], *(p for p in past if _number(p) == position.best_step)}:
        fs.remove(old)
    return target


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
