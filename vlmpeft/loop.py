"""The training loop: one stage, readable top to bottom, on accelerate.

Randomness is a counter: before every forward the generators are seeded from (seed, stage, step, micro-batch, process), so a
resumed run needs no saved generator and draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from vlmpeft import checkpoint, fs
from vlmpeft.build import Bundle, enter_stage
from vlmpeft.checkpoint import Position
from vlmpeft.data import Loaded, Sample, Samples, epoch_batches, load_batches, micro_batches
from vlmpeft.errors import NumericError
from vlmpeft.optim import adamw, lr_factor, parameter_groups, set_lr
from vlmpeft.recipe import RunConfig, Stage

METRICS = "metrics.jsonl"


class Preempted(Exception):
    """SIGTERM was received and the run's state is saved."""


@dataclass
class StageData:
    """Samples of a stage and how an image file becomes a tensor."""

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    load: Callable[[Path], Tensor]
    workers: int


@dataclass
class StageResult:
    """What the report says of a stage."""

    name: str
    steps: int
    seconds: float
    samples: int
    final_loss: float
    best_step: int | None
    trainable: list[dict[str, object]]


class StopSignal:
    """Turns SIGTERM into a flag that the loop reads between steps; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self.previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, self.previous)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)


def total_steps(stage: Stage, samples: int) -> int:
    """Optimizer steps of a stage: `optim.steps`, or `optim.epochs` over the samples."""
    per_epoch = math.ceil(samples / stage.batch.size)
    return stage.optim.steps or max(1, round(stage.optim.epochs * per_epoch))


def counter_seed(*counters: object) -> int:
    """A seed that depends on every counter and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, counters)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def planned(stage: Stage, samples: Sequence[Sample], seed: int, first: int, last: int) -> Iterator[list[int]]:
    """Sample indices of optimizer steps `first` to `last` - 1."""
    per_epoch = math.ceil(len(samples) / stage.batch.size)
    batches: list[list[int]] = []
    for step in range(first, last):
        epoch, within = divmod(step, per_epoch)
        if not batches or within == 0:
            batches = epoch_batches(samples, stage.batch.size, stage.batch.group, seed, epoch)
        yield batches[within]


class StageTrainer:
    """Trains one stage of a run.

    Args:
        bundle: the model; entered into the stage here.
        run_dir: where checkpoints and metrics go.
        position: where to go on; `position.stage` is this stage's index.
        facts: what a checkpoint's manifest records about the data.
    """

    def __init__(
        self, bundle: Bundle, name: str, stage: Stage, data: StageData, run: RunConfig, run_dir: Path,
        accelerator: Accelerator, position: Position, facts: dict[str, Any],
    ) -> None:  # fmt: skip
        self.bundle, self.name, self.stage, self.data, self.run = bundle, name, stage, data, run
        self.run_dir, self.accelerator, self.position, self.facts = run_dir, accelerator, position, facts
        enter_stage(bundle, stage)
        _checkpoint_activations(bundle, stage.gradient_checkpointing)
        self.optimizer = adamw(parameter_groups(bundle.tuned, stage.optim.lr, stage.optim.weight_decay), stage.optim.betas, stage.optim.eps)
        self.total = total_steps(stage, len(data.train))
        self.dataset = Samples(data.train, data.load)

    def resume(self, directory: Path) -> None:
        """Bring back the optimizer of a checkpoint written inside this stage."""
        checkpoint.load_optimizer(self.optimizer, directory)

    def train(self, stop: StopSignal) -> StageResult:
        """Run the stage to its end. Raises: NumericError N301; Preempted after SIGTERM, with the state saved."""
        model, optimizer = self.accelerator.prepare(self.bundle.model, self.optimizer)
        started, loss = time.perf_counter(), math.nan
        first, done_before = self.position.step, self.position.total - self.position.step
        steps = list(planned(self.stage, self.data.train, self.run.seed, first, self.total))
        shares = [micro_batches(s, self.stage.batch.micro, self.accelerator.process_index, self.accelerator.num_processes) for s in steps]
        batches = load_batches(self.dataset, [m for share in shares for m in share], self.data.workers, self.accelerator.device.type == "cuda")
        bar = tqdm(total=self.total, initial=first, desc=self.name, unit="step", disable=not self.accelerator.is_main_process, dynamic_ncols=True)
        for step, share in enumerate(shares, start=first):
            clock = time.perf_counter()
            group = [next(batches) for _ in share]
            lrs = set_lr(self.optimizer, lr_factor(step, self.total, self.stage.optim.warmup, self.stage.optim.schedule))
            loss, norm, supervised = self._step(model, optimizer, group, step)
            self.position = dataclasses.replace(self.position, step=step + 1, total=done_before + step + 1)
            tokens = sum(int(loaded.batch.attention_mask.sum()) for loaded in group) * self.accelerator.num_processes
            if (step + 1) % self.run.log_every == 0 or step + 1 == self.total:
                row = {"stage": self.name, "step": step + 1, "loss": loss, "lr": max(lrs.values()), "lrs": lrs, "grad_norm": norm}
                self._log({**row, "tokens_per_s": tokens / (time.perf_counter() - clock), "supervised_tokens": supervised})
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{max(lrs.values()):.1e}")
            if self._after_step(model, step + 1, stop):
                break
        bar.close()
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self._take_best()
        seconds = time.perf_counter() - started
        return StageResult(self.name, self.position.step, seconds, len(self.data.train), loss, self.position.best_step, self.bundle.tuned.table())

    def _step(self, model: Any, optimizer: Any, group: list[Loaded], step: int) -> tuple[float, float, int]:
        """One optimizer step. Returns: loss per supervised token, gradient norm before clipping, supervised tokens."""
        accelerator = self.accelerator
        model.train()
        supervised = int(accelerator.reduce(torch.tensor(sum(g.batch.num_supervised for g in group), device=accelerator.device)).item())
        total = torch.zeros((), device=accelerator.device)
        for micro, loaded in enumerate(group):
            set_seed(counter_seed(self.run.seed, self.position.stage, step, micro, accelerator.process_index))
            with _last_only(accelerator, model, micro == len(group) - 1):
                batch = loaded.batch.to(accelerator.device)
                loss = model(**batch.tensors(), num_items_in_batch=supervised).loss
                accelerator.backward(loss * accelerator.num_processes)  # processes are averaged: the sum is what counts
                total += loss.detach()
        parameters = list(self.bundle.tuned.trainable().values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value, norm_value = float(accelerator.reduce(total).item()), float(norm.item())
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            uids = ", ".join(uid for loaded in group for uid in loaded.uids)
            raise NumericError(
                "N301", f"stage {self.name} step {step + 1}: loss {value}, gradient norm {norm_value}, samples {uids}; the update was not made.",
                "lower optim.lr, set optim.clip=1.0, or look at these samples; the last checkpoint is good.",
            )  # fmt: skip
        if self.stage.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.stage.optim.clip, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value, norm_value, supervised

    def _after_step(self, model: Any, done: int, stop: StopSignal) -> bool:
        """Evaluate and save when due. Returns: whether the stage ends early."""
        early = False
        improved = False
        if self.run.eval_every and self.data.held_out and (done % self.run.eval_every == 0 or done == self.total):
            loss = self.held_out_loss(model)
            self._log({"stage": self.name, "step": done, "eval_loss": loss})
            improved = self.position.best_loss is None or loss < self.position.best_loss
            if improved:
                self.position = dataclasses.replace(self.position, best_loss=loss, best_step=self.position.total, bad_evals=0)
            else:
                self.position = dataclasses.replace(self.position, bad_evals=self.position.bad_evals + 1)
            early = 0 < self.run.patience <= self.position.bad_evals
        due = self.run.save_every and done % self.run.save_every == 0
        if (due or improved or stop.received) and done < self.total or improved:
            self._save()
        if stop.received and done < self.total:
            raise Preempted
        return early

    @torch.no_grad()
    def held_out_loss(self, model: Any) -> float:
        """Loss per supervised token over the held-out samples."""
        model.eval()
        total, count = torch.zeros((), device=self.accelerator.device), 0
        order = sorted(range(len(self.data.held_out)), key=lambda i: len(self.data.held_out[i].input_ids))
        micro = self.stage.batch.micro
        for loaded in load_batches(Samples(self.data.held_out, self.data.load), [order[i : i + micro] for i in range(0, len(order), micro)], 0):
            total += model(**loaded.batch.to(self.accelerator.device).tensors(), num_items_in_batch=1).loss
            count += loaded.batch.num_supervised
        return float(total.item()) / count

    def _take_best(self) -> None:
        """Bring back the weights of the best evaluation, if a later one was worse."""
        best = self.position.best_step
        if best is not None and best != self.position.total:
            directory = self.run_dir / "checkpoints" / f"step-{best}"
            checkpoint.restore_weights(self.bundle, directory)
            enter_stage(self.bundle, self.stage)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save_checkpoint(self.bundle, self.run_dir, self.position, self.optimizer, self.run.keep, self.facts)
        self.accelerator.wait_for_everyone()

    def _log(self, row: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        fs.append_line(self.run_dir / METRICS, json.dumps(row))
        numbers = {f"{self.name}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self.accelerator.log(numbers, step=self.position.total)


def _last_only(accelerator: Accelerator, model: Any, last: bool) -> Any:
    """Gradients travel between processes with the last micro-batch alone."""
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(model)


def _checkpoint_activations(bundle: Bundle, on: bool) -> None:
    if on:
        bundle.model.language.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        bundle.model.language.gradient_checkpointing_disable()
