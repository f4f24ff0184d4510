"""What a stage will take in memory and compute, from a recipe and config.json files alone: no weights, no data.

Letters: b samples of a forward, s tokens of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft.activations import Flops, Kept, Live, count
from vlmpeft.build import empty_model, image_tokens
from vlmpeft.errors import ConfigError
from vlmpeft.fake_model import Kernels, shapes_only
from vlmpeft.optim_memory import is_paged, optimizer_bytes
from vlmpeft.parts import PARTS, parts_by_name
from vlmpeft.quant_memory import bytes_by_parameter
from vlmpeft.recipe import Recipe, Stage
from vlmpeft.steering import MoReS, positions
from vlmpeft.tune import Tuned
from vlmpeft.vlm import VLM

CONTEXT = 600 << 20  # bytes that CUDA and its libraries take before any tensor; 400 to 800 MiB on recent GPUs
MARGIN = 0.08  # of the sum, for what the allocator cannot use and for the kernels' workspace: assumed, not measured
SAMPLED = 2  # blocks that are run where all are alike; the others are as the second


class Planned(VLM):
    """The model on shapes: there are no ids to count placeholders in."""

    @staticmethod
    def _check_count(visual: Tensor, tokens: int) -> None:
        pass


@dataclass(frozen=True)
class Shape:
    """What one forward sees. Args: batch: b. length: s. views, tokens: of a sample's image, and of a view."""

    batch: int
    length: int
    views: int
    tokens: int


@dataclass(frozen=True)
class StageMemory:
    """Bytes by what they are for, and floating-point operations of one forward and backward of b samples.

    Args:
        weights: frozen ones by part. paged: whether CUDA moves the optimizer's moments to the host when it is full.
        tower: what the vision tower takes while it runs, when nothing else of a step is there yet.
    """

    shape: Shape
    checkpointing: bool
    parameters: int
    trainable: int
    weights: Mapping[str, int]
    trained: int
    gradients: int
    optimizer: int
    paged: bool
    casts: int
    activations: int
    logits: int
    tower: int
    forward: int
    backward: int

    @property
    def total(self) -> int:
        """The most that tensors take at one time."""
        lasting = sum(self.weights.values()) + self.trained + self.gradients + self.optimizer
        return lasting + max(self.tower, self.casts + self.activations + self.logits)

    @property
    def needed(self) -> int:
        """`total` with the margin."""
        return int(self.total * (1 + MARGIN)) + CONTEXT

    def with_batch(self, batch: int) -> StageMemory:
        """The same with as many samples in a forward: all that depends on them is in proportion."""

        def scaled(number: int) -> int:
            return number * batch // self.shape.batch

        return replace(
            self, shape=replace(self.shape, batch=batch), activations=scaled(self.activations),
            logits=scaled(self.logits), tower=scaled(self.tower), forward=scaled(self.forward),
            backward=scaled(self.backward),
        )  # fmt: skip

    def flops(self, samples: int) -> int:
        """Of as many samples. With checkpointing the blocks are computed once more, here counted as a forward."""
        return (self.forward * (2 if self.checkpointing else 1) + self.backward) * samples // self.shape.batch


def shape_of(recipe: Recipe, stage: Stage, length: int | None) -> Shape:
    """The largest forward of a stage: samples of `length` tokens, or data.max_length, with one image each.

    Raises: ConfigError C102 for a length that holds no image.
    """
    tokens, size = image_tokens(empty_model(recipe)), length or recipe.data.max_length
    if size <= tokens:
        raise ConfigError("C102", f"length={size} holds no image of {tokens} tokens.", "raise length.")
    most = 1 + max(rows * columns for rows, columns in recipe.data.tiles) if recipe.data.image_mode == "anyres" else 1
    return Shape(stage.batch.micro, size, max(1, min(most, (size - 1) // tokens)), tokens)


def plan_stage(recipe: Recipe, name: str, length: int | None = None) -> StageMemory:
    """What a stage takes. Earlier stages' adapters are in the model, frozen, as in a run. Raises: ModelError; C102."""
    stage, dtype = recipe.stages[name], dtype_of(recipe)
    shape = shape_of(recipe, stage, length)
    tuned, sizes = tuned_model(recipe, name, dtype)
    part_of, weights = parts_by_name(tuned.model, tuned.parts), dict.fromkeys(PARTS, 0)
    trainable = list(tuned.trainable().values())
    for key, parameter in tuned.model.named_parameters():
        if not parameter.requires_grad:
            weights[part_of[key]] += sizes.get(id(parameter), 4 * parameter.numel())
    numbers = sum(p.numel() for p in trainable)
    optimizer = optimizer_bytes(stage.optim.name, trainable)
    parameters = sum(p.numel() for p in tuned.model.parameters())
    kept, flops, tower = run_on_shapes(tuned, stage, shape, dtype)
    rows = shape.batch * (shape.length - shape.views * shape.tokens)
    model: Any = tuned.model
    vocabulary = model.config.get_text_config().vocab_size
    return StageMemory(
        shape=shape, checkpointing=stage.gradient_checkpointing, parameters=parameters, trainable=numbers,
        weights=weights, trained=4 * numbers, gradients=4 * numbers, optimizer=optimizer,
        paged=is_paged(stage.optim.name, device_of(recipe)), casts=kept.casts,
        activations=kept.total(stage.gradient_checkpointing), logits=rows * vocabulary * (dtype.itemsize + 8),
        tower=tower, forward=flops.forward, backward=flops.backward,
    )  # fmt: skip


def device_of(recipe: Recipe) -> str:
    """The type of device that is planned for: what the recipe names, else a CUDA one, which may be elsewhere."""
    return "cuda" if recipe.run.device == "auto" else recipe.run.device.split(":")[0]


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The precision planned for; "auto" is bf16, as on a GPU."""
    return torch.float32 if recipe.run.precision == "fp32" else torch.bfloat16


def tuned_model(recipe: Recipe, name: str, dtype: torch.dtype) -> tuple[Tuned, dict[int, int]]:
    """The model of a stage on the meta device. Returns: it; bytes of every base parameter, by id."""
    model = empty_model(recipe)
    model = Planned(model.vision.to(dtype), model.projector, model.language.to(dtype))
    sizes = bytes_by_parameter(model, model.parts, recipe.quant, dtype)
    tuned = Tuned(model, model.parts)
    for each in list(recipe.stages)[: list(recipe.stages).index(name) + 1]:
        tuned.apply(recipe.stages[each].tuners)
    return tuned, sizes


def run_on_shapes(tuned: Tuned, stage: Stage, shape: Shape, dtype: torch.dtype) -> tuple[Kept, Flops, int]:
    """What a forward keeps, what forward and backward compute, and what the tower takes.

    Where all blocks are alike two are run, and then one: the model is cut, and is of no more use.
    """
    model: Any = tuned.model
    listed = list(tuned.parts.blocks)
    blocks = next(m for m in tuned.parts.language.modules() if isinstance(m, nn.ModuleList) and list(m) == listed)
    total, trains = len(blocks), {name for name, p in model.named_parameters() if p.requires_grad}
    alike = len({_signature(block) for block in blocks}) == 1 and total > SAMPLED
    steered = [t for t in stage.tuners.values() if isinstance(t, MoReS)]
    chosen = [positions.chosen(positions.parse(t.positions), torch.ones(1, shape.tokens).bool()) for t in steered]
    numbers = max((int(one.sum()) for one in chosen), default=1)
    with shapes_only(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trains)
        model.train()
        inputs = _inputs(shape, tuned.parts.vision, dtype)
        with torch.no_grad(), Kernels(), Live([*model.parameters(), *model.buffers()]) as live:
            model.vision(inputs["pixel_values"])
        results = []
        for kept in range(SAMPLED, 0, -1) if alike else (total,):
            del blocks[kept:]
            kernels = Kernels(numbers)
            results.append(count(model, list(blocks), inputs, kernels, dtype))
            model.zero_grad(set_to_none=True)
    return *(_stretched(*results[0], *results[1], total) if alike else results[0]), live.peak


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """What makes two blocks alike: their modules, shapes and what trains."""
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters()]
    return type(block), getattr(block, "attention_type", None), *shapes


def _stretched(two: Kept, flops_two: Flops, one: Kept, flops_one: Flops, total: int) -> tuple[Kept, Flops]:
    """What so many blocks come to, of which one and two were run."""

    def line(a: int, b: int) -> int:
        return a + (total - 1) * (b - a)

    casts, outside = line(one.casts, two.casts), line(one.outside, two.outside)
    kept = Kept((two.blocks[0], *two.blocks[1:] * (total - 1)), outside, casts, two.logits, two.entry)
    forward, backward = line(flops_one.forward, flops_two.forward), line(flops_one.backward, flops_two.backward)
    return kept, Flops(forward, backward)


def _inputs(shape: Shape, vision: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of fake tensors: one image a sample, every token of text supervised."""
    b, s, side = shape.batch, shape.length, vision.image_size
    ids = torch.empty(b, s, dtype=torch.int64)
    rows = torch.empty(b * (s - shape.views * shape.tokens), dtype=torch.int64)
    pixels = torch.empty(b * shape.views, 3, side, side, dtype=dtype)
    mask = torch.empty(b, s, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "pixel_values": pixels, "supervised": rows}
