"""What `doctor` checks of one stage: its records, one batch of them, and a few steps on that batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.build import Bundle, enter_stage
from vlmpeft.data import Loaded, Samples, load_batches, micro_batches
from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.findings import Findings
from vlmpeft.forward import calibrate, checkpoint_activations
from vlmpeft.gradient_flow import Flow, measure, require_falling, require_reached
from vlmpeft.images import ImageReader
from vlmpeft.mixture import Mixture, split_held_out, supervised_share
from vlmpeft.optim import make_optimizer, parameter_groups
from vlmpeft.preflight import data_files, prepare_stage
from vlmpeft.recipe import Stage
from vlmpeft.stage import StageData, planned, total_steps
from vlmpeft.steps import Steps
from vlmpeft.supervision import check_supervision, conversation_of, supervised_texts
from vlmpeft.tuners.base import BeforeStep
from vlmpeft.unchanged import bits_of

LOOKED = 64  # optimizer steps among which a batch with an image is looked for
SHOWN = 120  # characters of supervised text


def examine_records(bundle: Bundle, name: str, found: Findings) -> StageData:
    """Prepare the records of a stage as training does, and say what became of them. Raises: DataError."""
    read, data = ImageReader(bundle.image_transform), bundle.recipe.data
    prepared = prepare_stage(bundle, name, read, None, lambda _: None)
    samples, skipped = prepared.samples, prepared.skipped
    supervised, tokens = supervised_share(samples)
    lengths, pictures = np.asarray(samples.lengths), np.asarray(samples.pictures)
    text = f"records {prepared.records:,} = used {len(samples):,} + skipped {len(skipped):,}; supervised "
    text += f"{supervised / tokens:.1%} of {tokens:,} tokens; length median {np.median(lengths):.0f}, longest "
    text += f"{lengths.max()}; images a sample {pictures.mean():.2f}, samples without one {(pictures == 0).sum():,}"
    found.add("ok", name, "records", text)
    if skipped:
        codes = sorted({error.code for error in skipped})
        found.add("note", name, "skipped", f"{len(skipped):,} ({', '.join(codes)}), first: {skipped[0].line()}")
    if samples.cut:
        found.add("note", name, "cut", f"{samples.cut:,} samples lose their end at data.max_length={data.max_length}")
    if not pictures.any():
        found.add("note", name, "images", "no sample has an image, so a projector learns nothing here")
    train, held_out = split_held_out(samples, data.held_out, bundle.recipe.run.seed)
    return StageData(train, held_out, read, 0)


def choose(stage: Stage, samples: Mixture, seed: int) -> list[int]:
    """Indices of a forward that training would make, with an image in it if any sample has one."""
    steps = planned(stage, samples, seed, 0, min(LOOKED, total_steps(stage, len(samples))))
    forwards = [f for step in steps for f in micro_batches(step, stage.batch.micro, 0, 1) if f]
    shown = next((f for f in forwards if any(samples.pictures[i] for i in f)), None)
    if shown is None and any(samples.pictures):
        with_images = (i for i, pictures in enumerate(samples.pictures) if pictures)
        return list(itertools.islice(with_images, stage.batch.micro))
    return shown or forwards[0]


def examine_batch(bundle: Bundle, name: str, data: StageData, chosen: Sequence[int], found: Findings) -> Loaded:
    """Read one batch and account for its tokens. Raises: DataError, ModelError M515."""
    samples, tokenizer = [data.train[i] for i in chosen], bundle.tokenizer
    files, config = data_files(bundle.recipe, name), bundle.recipe.data
    loaded = next(load_batches(Samples(data.train, data.load), [chosen], 0))
    said = " | ".join(supervised_texts(samples[0], tokenizer))
    shape = "x".join(map(str, loaded.batch.input_ids.shape))
    text = f'{shape} tokens; sample "{samples[0].uid}" is taught: {said[:SHOWN]}{"..." if len(said) > SHOWN else ""}'
    found.add("ok", name, "batch", text)
    for sample, index in zip(samples, chosen, strict=True):
        check_supervision(sample, conversation_of(data.train, index, files, config), tokenizer)
    found.add("ok", name, "labels", f"the answers of {len(samples)} records and their end marks, and nothing else")
    found.add("ok", name, "image tokens", _image_tokens(bundle, loaded))
    return loaded


@torch.no_grad()
def _image_tokens(bundle: Bundle, loaded: Loaded) -> str:
    """Placeholders against what the projector gives. Raises: ModelError M515 if they differ."""
    placeholders, pixels = int((loaded.batch.input_ids == IMAGE_TOKEN_ID).sum()), loaded.batch.pixel_values
    device = bundle.model.language.get_input_embeddings().weight.device
    given = torch.empty(0, 0, 0) if pixels is None else bundle.model.image_embeddings(pixels.to(device))
    views, each = given.shape[:2]
    if views * each != placeholders:
        message = f"{placeholders} placeholders in the batch, but the projector gives {views} x {each} tokens."
        raise ModelError("M515", message, "its num_tokens(n) must be what its forward gives.")
    return f"{placeholders} placeholders = {views} views x {each} tokens of the projector"


def examine_tuning(
    bundle: Bundle, name: str, data: StageData, loaded: Loaded, accelerator: Accelerator, found: Findings
) -> dict[str, Tensor]:
    """Take a few steps on the batch. Returns: the trained tensors as they were, by name, on the CPU.

    Raises: ModelError M593, M594; NumericError N301, N302; EnvironmentFault E401; and as the tuners.
    """
    stage, tuned = bundle.recipe.stages[name], bundle.tuned
    checkpoint_activations(bundle.model.language, stage.gradient_checkpointing)
    calibrate(accelerator, tuned, data, bundle.recipe.run.seed)
    steps = Steps(tuned, total_steps(stage, data.epoch), stage.optim.l2_sp)
    trained = tuned.trainable()
    start = {key: p.detach().to("cpu", copy=True) for key, p in trained.items()}
    frozen = _frozen(bundle, trained)
    before = bits_of(frozen)

    def optimizer() -> torch.optim.Optimizer:
        return make_optimizer(parameter_groups(tuned, stage.optim.lr, stage.optim.weight_decay), stage.optim, device)

    device = accelerator.device
    try:
        flow = measure(accelerator, tuned, loaded, steps, optimizer, stage.optim.clip)
    except torch.OutOfMemoryError as error:
        knobs = "lower batch.micro or data.max_length, or set gradient_checkpointing=true; see vlmpeft plan."
        raise EnvironmentFault("E401", f"out of memory: {str(error).splitlines()[0]}", knobs) from error
    reasons = require_reached(tuned, flow, loaded)
    found.add("ok", name, "gradients", _reached(flow))
    for reason in reasons:
        found.add("note", name, "gradients", reason)
    for tuner in (a.tuner for key, a in tuned.applied.items() if key in tuned.active):
        if isinstance(tuner, BeforeStep):
            found.add("note", name, "gradients", f"checked with all of '{tuner.kind}' training, as at the end")
    _require_frozen(bundle, trained, frozen, before)
    found.add("ok", name, "frozen", f"{len(frozen):,} tensors got no gradient and kept every bit")
    found.add("ok" if flow.factor == 1 else "note", name, "loss", require_falling(flow))
    return start


def enter(bundle: Bundle, name: str, found: Findings) -> None:
    """Apply a stage's tuners. Raises: ModelError as they do."""
    enter_stage(bundle, bundle.recipe.stages[name])
    rows: list[Mapping[str, Any]] = [row for row in bundle.tuned.table() if row["trainable"]]
    text = ", ".join(f"{row['part']} {row['trainable']:,} of {row['total']:,}" for row in rows)
    found.add("ok", name, "trains", text)


def _reached(flow: Flow) -> str:
    parts = []
    for name, reach in flow.reach.items():
        later = f", {reach.later} of them from a later step on" if reach.later else ""
        parts.append(f"'{name}' {reach.at_once + reach.later} tensors{later}")
    return f"the loss reaches {'; '.join(parts)}"


def _frozen(bundle: Bundle, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that must stay as it is: what no tuner trains, and the buffers of the frozen parts."""
    ours = {id(p) for p in trained.values()}
    found: dict[str, Tensor] = {k: p for k, p in bundle.model.named_parameters() if id(p) not in ours}
    parts = ("vision.", "language.")
    return found | {k: b for k, b in bundle.model.named_buffers() if k.startswith(parts)}


def _require_frozen(
    bundle: Bundle, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor], before: Mapping[str, tuple[int, int]]
) -> None:
    """Raise ModelError M594 if a tensor that no tuner trains has a gradient or has changed."""
    gradients = [k for k, p in frozen.items() if p.requires_grad or p.grad is not None]
    after = bits_of(frozen)
    wrong = gradients or [key for key in frozen if after[key] != before[key]]
    if wrong:
        what = "has a gradient" if gradients else "changed"
        raise ModelError("M594", f"{wrong[0]} {what}, but no tuner trains it ({len(wrong)} such).", "train it openly.")
