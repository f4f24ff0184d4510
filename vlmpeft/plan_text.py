"""A memory plan for people and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmpeft.memory_plan import CONTEXT, MARGIN, StageMemory
from vlmpeft.recipe import Recipe
from vlmpeft.stage import total_steps

GIB = 2**30
HONEST = (
    f"With the margin: {MARGIN:.0%} for what the allocator cannot use and for the kernels' workspace, and "
    f"{CONTEXT >> 20} MiB for the CUDA context; both are assumed, not measured. All text is taken as supervised, "
    "and the attention's mask as that of samples of several lengths."
)


def plan_text(recipe: Recipe, name: str, plan: StageMemory, data: tuple[int, int] | None) -> str:
    """A stage as a table. Args: data: samples of an epoch and their tokens, if they are known."""
    shape, stage = plan.shape, recipe.stages[name]
    image = f"{shape.tokens} image tokens x {shape.views} views a sample"
    lines = [f"{name}: {shape.batch} x {shape.length} tokens a forward, {image}"]
    lines += [_line(f"weights {part}", size) for part, size in plan.weights.items() if size]
    kind = f"{stage.optim.name}, {_place(plan)}"
    checkpointed = "blocks' inputs and one block" if plan.checkpointing else "of all blocks"
    lines += [
        _line("weights that train", plan.trained, "fp32"),
        _line("gradients", plan.gradients, "fp32"),
        _line("optimizer", plan.optimizer, kind),
        _line("casts of what trains", plan.casts, "for the products"),
        _line("activations", plan.activations, checkpointed),
        _line("logits", plan.logits, "with their loss"),
        _line("vision tower", plan.tower, "while it runs, before the activations"),
        _line("total", plan.total),
        _line("with the margin", plan.needed),
        f"  parameters {plan.parameters:,}, trained {plan.trainable:,}",
        f"  an optimizer step of {stage.batch.size} samples: {plan.flops(stage.batch.size) / 1e12:,.1f} TFLOP",
    ]
    if data is not None:
        lines.append(
            f"  the stage, by the mean length of its data: {run_flops(recipe, name, plan, data) / 1e15:,.3f} PFLOP"
        )
    return "\n".join(lines)


def _place(plan: StageMemory) -> str:
    return "on the device, moved to the host when that is full" if plan.paged else "on the device"


def _line(name: str, size: int, note: str = "") -> str:
    return f"  {name:<22}{size / GIB:>8.2f} GiB  {note}".rstrip()


def run_flops(recipe: Recipe, name: str, plan: StageMemory, data: tuple[int, int]) -> int:
    """Of a whole stage, in proportion to the tokens. Args: data: samples of an epoch and their tokens."""
    stage, (samples, tokens) = recipe.stages[name], data
    seen = total_steps(stage, samples) * stage.batch.size if stage.optim.steps else samples * stage.optim.epochs
    return int(plan.flops(1) * seen * tokens / samples / plan.shape.length)


def plan_values(recipe: Recipe, name: str, plan: StageMemory, data: tuple[int, int] | None) -> dict[str, Any]:
    """The same in bytes and numbers, for JSON."""
    values = dataclasses.asdict(plan) | {"total": plan.total, "needed": plan.needed}
    values["flops_step"] = plan.flops(recipe.stages[name].batch.size)
    values["flops_run"] = None if data is None else run_flops(recipe, name, plan, data)
    return values
