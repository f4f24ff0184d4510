"""What a few optimizer steps on one batch prove: which trained tensors the loss reaches, and that it falls.

Two steps at least: an adapter whose B starts at zero gives its A a gradient of exactly zero until B has moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmpeft.data import Loaded
from vlmpeft.errors import ModelError, NumericError
from vlmpeft.forward import loss_of
from vlmpeft.optim import set_lr
from vlmpeft.steering import MoReS
from vlmpeft.steering.layers import parse_layers
from vlmpeft.steps import Steps
from vlmpeft.tune import Tuned
from vlmpeft.weights import assign

STEPS = 4


@dataclass(frozen=True)
class Reach:
    """The trained tensors of a tuner, by the step in which the loss first reached them.

    Args:
        at_once, later: how many had a gradient that is not zero at the first step, and since a later one.
        never: names of those that had none in any step; a part of a stacked tensor is named by its number.
    """

    at_once: int
    later: int
    never: tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """What the steps came to. Args: reach: by tuner. before, after: loss without dropout. factor: on the rates."""

    reach: Mapping[str, Reach]
    before: float
    after: float
    factor: float


def measure(
    accelerator: Accelerator, tuned: Tuned, loaded: Loaded, steps: Steps, optimizer: Callable[[], Any],
    clip: float | None, count: int = STEPS,
) -> Flow:  # fmt: skip
    """Train `count` steps on one batch at the full learning rates, or at a tenth if the loss rises at those.

    The model is left as the last step made it.
    Args: optimizer: makes a fresh one, whose groups have a "peak_lr". clip: gradient norm.
    Raises: NumericError N301 for a loss or gradient that is not finite.
    """
    start = {name: p.detach().clone() for name, p in tuned.trainable().items()}
    before = _evaluated(accelerator, tuned, loaded)
    for factor in (1.0, 0.1):
        assign(tuned.trainable(), start)
        reach = _train(accelerator, tuned, loaded, steps, optimizer(), clip, factor, count)
        after = _evaluated(accelerator, tuned, loaded)
        if after < before:
            break
    return Flow(reach, before, after, factor)


def _train(
    accelerator: Accelerator, tuned: Tuned, loaded: Loaded, steps: Steps, optimizer: Any,
    clip: float | None, factor: float, count: int,
) -> dict[str, Reach]:  # fmt: skip
    tuned.model.train()
    rows = []
    for _ in range(count):
        steps.before(steps.total - 1)  # at the end of a stage everything trains that ever does
        set_lr(optimizer, factor)
        loss = loss_of(accelerator, tuned.model, loaded, max(1, loaded.batch.num_supervised))
        _refuse_nonfinite(float(loss.detach().item()), loaded)
        if loss.requires_grad:  # else nothing that trains is in the graph, which is told below
            loss.backward()
        rows.append(dict(_largest(tuned)))
        steps.add_gradients()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(tuned.trainable().values()), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: _reach(tuned, name, rows) for name in tuned.claims()}


def _largest(tuned: Tuned) -> Iterator[tuple[str, Tensor]]:
    """The largest entry of every gradient, by name: of stacked units one each. Raises: NumericError N301."""
    for name, tuner, key, parameter in _trained(tuned):
        if parameter.grad is None:
            continue
        sizes = parameter.grad.detach().abs()
        rows = sizes.flatten(1).amax(1) if isinstance(tuner, MoReS) else sizes.amax()[None]
        if not torch.isfinite(rows).all():
            message = f"tuner '{name}': the gradient of {key} is not finite."
            raise NumericError("N301", message, "look at the samples of the batch, or set run.precision=fp32.")
        yield key, rows > 0


def _trained(tuned: Tuned) -> Iterator[tuple[str, Any, str, torch.nn.Parameter]]:
    """Tuner, by name and itself, and every parameter that it trains, by name and itself."""
    for name, parameters in tuned.claims().items():
        for key, parameter in parameters.items():
            yield name, tuned.applied[name].tuner, key, parameter


def _reach(tuned: Tuned, name: str, rows: list[dict[str, Tensor]]) -> Reach:
    at_once, later, never = 0, 0, []
    for key in tuned.claims()[name]:
        found = [row[key] for row in rows if key in row]
        if not found:
            never.append(key)
            continue
        first, ever = rows[0].get(key, torch.zeros_like(found[0])), torch.stack(found).any(0)
        at_once += bool(first.all())
        later += bool(ever.all() and not first.all())
        dead = (~ever).nonzero().flatten().tolist()
        never += [f"{key}[{i}]" for i in dead] if len(ever) > 1 else [key] * len(dead)
    return Reach(at_once, later, tuple(never))


@torch.no_grad()
def _evaluated(accelerator: Accelerator, tuned: Tuned, loaded: Loaded) -> float:
    """Loss a supervised token without dropout. Raises: NumericError N301."""
    tuned.model.eval()
    loss = float(loss_of(accelerator, tuned.model, loaded, max(1, loaded.batch.num_supervised)).item())
    _refuse_nonfinite(loss, loaded)
    return loss


def _refuse_nonfinite(loss: float, loaded: Loaded) -> None:
    if not math.isfinite(loss):
        message = f"loss {loss} on samples {', '.join(loaded.uids)}."
        raise NumericError("N301", message, "look at these samples and at the base weights, or set optim.clip=1.0.")


def why_silent(tuned: Tuned, tuner_name: str, key: str, loaded: Loaded) -> str:
    """Why the loss of this batch cannot reach a trained tensor; "" where nothing explains it."""
    tuner: Any = tuned.applied[tuner_name].tuner
    where = "visual" if isinstance(tuner, MoReS) and tuner.tokens == "visual" else getattr(tuner, "where", "all")
    if loaded.batch.pixel_values is None and (tuner.part in ("vision", "projector") or where == "visual"):
        return "the batch has no image"
    if ".experts." in key:
        return "no token of the batch was routed to this expert"
    if tuner.kind == "token_rows":
        return "none of the new tokens is in the batch"
    blocks = len(tuned.parts.blocks)
    last = _is_last_unit(tuner, key, blocks) if isinstance(tuner, MoReS) else f".{blocks - 1}." in key
    return "behind the last attention an image token reaches no answer" if where == "visual" and last else ""


def _is_last_unit(tuner: MoReS, key: str, blocks: int) -> bool:
    """Whether a key is the part of a stack that steers what the last block writes."""
    steered = parse_layers(tuner.layers, blocks)
    place = f"[{len(steered) - 1}]" if len(steered) > 1 else ""
    return tuner.site == "block_output" and steered[-1] == blocks - 1 and key.endswith(place)


def require_reached(tuned: Tuned, flow: Flow, loaded: Loaded) -> list[str]:
    """Why tensors that had no gradient had none, a line each. Raises: ModelError M593 for one that nothing explains."""
    explained: dict[tuple[str, str], int] = {}
    for name, reach in flow.reach.items():
        reasons = {key: why_silent(tuned, name, key, loaded) for key in reach.never}
        silent = [key for key, reason in reasons.items() if not reason]
        if silent:
            total = len(tuned.claims()[name])
            message = f"tuner '{name}': the loss reaches {total - len(silent)} of {total} tensors; {silent[0]} never."
            fix = "something between it and the loss cuts the graph (detach, no_grad), or its output is not used."
            raise ModelError("M593", message, fix)
        for reason in reasons.values():
            explained[name, reason] = explained.get((name, reason), 0) + 1
    return [f"tuner '{name}': {n} without gradient: {reason}" for (name, reason), n in explained.items()]


def require_falling(flow: Flow) -> str:
    """What the loss did. Raises: NumericError N302 if it did not fall at any rate."""
    change = f"loss of this batch {flow.before:.4f} -> {flow.after:.4f} in {STEPS} steps"
    if flow.after < flow.before:
        return f"{change} at {'the full' if flow.factor == 1 else 'a tenth of the'} learning rate"
    message = f"{change}, at the full learning rate and at a tenth of it."
    raise NumericError("N302", message, "lower optim.lr; if that does not help, what trains does not act on the loss.")
