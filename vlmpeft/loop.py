"""The training loop: one stage, readable top to bottom, on accelerate.

Randomness is a counter: before every forward the generators are seeded from (seed, stage, step, micro-batch, process),
so a resumed run needs no saved generator and draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from vlmpeft import checkpoint, fs, resume, sharding
from vlmpeft.build import Bundle, enter_stage
from vlmpeft.data import Loaded, Samples, load_batches, micro_batches
from vlmpeft.diagnose import Diagnosis
from vlmpeft.distributed import any_process, of_main, total
from vlmpeft.drift import Drift
from vlmpeft.errors import EnvironmentFault, NumericError
from vlmpeft.forward import before_step, calibrate, checkpoint_activations, held_out_loss, loss_of
from vlmpeft.manifest import verify
from vlmpeft.optim import lr_factor, make_optimizer, parameter_groups, set_lr
from vlmpeft.recipe import RunConfig, Stage
from vlmpeft.resume import Position
from vlmpeft.stage import Figure, StageData, StageResult, counter_seed, planned, total_steps
from vlmpeft.stopping import Preempted, StopSignal

METRICS = "metrics.jsonl"


class StageTrainer:
    """Trains one stage of a run.

    Args:
        bundle: the model; entered into the stage here.
        run_dir: where checkpoints and metrics go.
        position: where to go on; `position.stage` is this stage's index.
        facts: what a checkpoint's manifest records about the data.
        figure: of an evaluation, by which the best state of the stage is known instead of the held-out loss.
    """

    def __init__(
        self, bundle: Bundle, name: str, stage: Stage, data: StageData, run: RunConfig, run_dir: Path,
        accelerator: Accelerator, position: Position, facts: dict[str, Any], figure: Figure | None = None,
    ) -> None:  # fmt: skip
        self.bundle, self.name, self.stage, self.data, self.run = bundle, name, stage, data, run
        self.run_dir, self.accelerator, self.position, self.facts = run_dir, accelerator, position, facts
        self.figure = figure
        enter_stage(bundle, stage)
        checkpoint_activations(bundle.model.language, stage.gradient_checkpointing)
        calibrate(accelerator, bundle.tuned, data, run.seed)
        self.sharded = sharding.wanted(accelerator)
        if self.sharded:
            sharding.shard(bundle.tuned, accelerator)
        self.drift = Drift(bundle.tuned, stage.optim.l2_sp) if stage.optim.l2_sp else None
        groups = parameter_groups(bundle.tuned, stage.optim.lr, stage.optim.weight_decay)
        self.optimizer = make_optimizer(groups, stage.optim, accelerator.device)
        self.total = total_steps(stage, data.epoch)
        self.samples = Samples(data.train, data.load)
        self.diagnosis = Diagnosis(bundle, stage, data, accelerator, self._log)

    def resume(self, directory: Path) -> None:
        """Bring back the optimizer, and what L2-SP starts from, of a checkpoint written inside this stage."""
        resume.load_optimizer(self.optimizer, directory)
        if self.drift is not None:
            resume.load_start(self.drift, directory)

    def train(self, stop: StopSignal) -> StageResult:
        """Run the stage to its end. The caller saves the end.

        Raises: NumericError N301 for a loss or gradient that is not finite, before the update; EnvironmentFault E401
        out of memory; Preempted after SIGTERM, with the state saved.
        """
        model, optimizer = self._prepared()
        started = time.perf_counter() - self.position.seconds
        over = self._is_over() if self.position.evaluated else self._after_step(model, stop)
        first = self.position.step
        shares = self._shares(first, first if over else self.total)
        indices, pin = [forward for share in shares for forward in share], self.accelerator.device.type == "cuda"
        batches = load_batches(self.samples, indices, self.data.workers, pin)
        silent = not self.accelerator.is_main_process
        with tqdm(total=self.total, initial=first, desc=self.name, unit="step", disable=silent) as bar:
            for step, share in enumerate(shares, start=first):
                self.diagnosis(model, step)
                began = time.perf_counter()
                group = [next(batches) for _ in share]
                factor = lr_factor(step, self.total, self.stage.optim.warmup, self.stage.optim.schedule)
                lrs = set_lr(self.optimizer, factor)
                found = self._step(model, optimizer, group, step)
                loss, norm = found.pop("loss"), found.pop("grad_norm")
                self.position = replace(
                    self.position, step=step + 1, total=self.position.total + 1, loss=loss,
                    evaluated=not self._evaluation_due(step + 1), seconds=time.perf_counter() - started,
                    processes=self.accelerator.num_processes,
                )  # fmt: skip
                if (step + 1) % self.run.log_every == 0 or step + 1 == self.total:
                    speed = self._tokens(group) / (time.perf_counter() - began)
                    self._log(loss=loss, lr=max(lrs.values()), lrs=lrs, grad_norm=norm, tokens_per_s=speed, **found)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{max(lrs.values()):.1e}", refresh=False)
                bar.update()
                if self._after_step(model, stop):
                    break
        self.diagnosis(model, self.position.step, last=True)
        if not self.sharded:
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self._take_best()
        done, table = self.position, self.bundle.tuned.table()
        return StageResult(self.name, done.step, done.seconds, len(self.data.train), done.loss, done.best_step, table)

    def _prepared(self) -> tuple[Any, Any]:
        """Model and optimizer for this process: with DDP where there are several and the model is not sharded."""
        if self.sharded:
            return self.bundle.model, self.optimizer
        placed = [True, False]  # the optimizer's state is in its place; accelerate would copy it, out of its pages
        return self.accelerator.prepare(self.bundle.model, self.optimizer, device_placement=placed)

    def _shares(self, first: int, last: int) -> list[list[list[int]]]:
        """This process's forwards of each step: sample indices."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        steps = planned(self.stage, self.data.train, self.run.seed, first, last)
        return [micro_batches(step, self.stage.batch.micro, rank, world) for step in steps]

    def _tokens(self, group: list[Loaded]) -> int:
        return sum(int(g.batch.attention_mask.sum()) for g in group) * self.accelerator.num_processes

    def _step(self, model: Any, optimizer: Any, group: list[Loaded], step: int) -> dict[str, Any]:
        """One optimizer step. Returns: loss per supervised token, gradient norm before clipping, supervised tokens."""
        model.train()
        before_step(self.accelerator, self.bundle.tuned, step)
        supervised = int(total(self.accelerator, sum(g.batch.num_supervised for g in group)))
        try:
            value = self._gradients(model, group, step, supervised)
        except torch.OutOfMemoryError as error:
            message = f"out of memory in stage {self.name} step {step + 1}: {str(error).splitlines()[0]}"
            knobs = "lower batch.micro or data.max_length, or set gradient_checkpointing=true."
            raise EnvironmentFault("E401", message, knobs) from error
        drift = {} if self.drift is None else {"drift": float(sharding.gathered(self.drift.add_gradient()).item())}
        parameters = list(self.bundle.tuned.trainable().values())
        size = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(sharding.gathered(size).item())
        self._refuse_nonfinite(group, step, value, norm)
        if self.stage.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.stage.optim.clip, size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": value, "grad_norm": norm, "supervised_tokens": supervised, **drift}

    def _gradients(self, model: Any, group: list[Loaded], step: int, supervised: int) -> float:
        """Forward and backward of every micro-batch; gradients add up. Returns: loss per supervised token."""
        accelerator = self.accelerator
        summed = torch.zeros((), device=accelerator.device)
        for micro, loaded in enumerate(group):
            set_seed(counter_seed(self.run.seed, self.position.stage, step, micro, accelerator.process_index))
            last = micro == len(group) - 1  # gradients travel between processes with the last micro-batch alone
            sharding.synchronise(model, last)
            with contextlib.nullcontext() if last or self.sharded else accelerator.no_sync(model):
                loss = loss_of(accelerator, model, loaded, supervised)
                accelerator.backward(loss * accelerator.num_processes)  # processes are averaged; we want the sum
                summed += loss.detach()
        return total(accelerator, summed)

    def _refuse_nonfinite(self, group: list[Loaded], step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rates = ", ".join(f"{g['name']} {g['lr']:.2e}" for g in self.optimizer.param_groups)
            uids = ", ".join(uid for loaded in group for uid in loaded.uids)
            found = f"loss {loss}, gradient norm {norm}, learning rate {rates}, samples {uids}"
            raise NumericError(
                "N301",
                f"stage {self.name} step {step + 1}: {found}; the update was not made.",
                "lower optim.lr, set optim.clip=1.0, or look at these samples; the last checkpoint is good.",
            )

    def _after_step(self, model: Any, stop: StopSignal) -> bool:
        """Evaluate and save when due. Returns: whether the stage is over. Raises: Preempted, with the state saved."""
        improved = False
        if not (self.position.evaluated or self._stopping(stop)):
            improved = self._evaluate(model, stop)
        over, stopping = self._is_over(), self._stopping(stop)
        due = self.run.save_every > 0 and self.position.step % self.run.save_every == 0
        if stopping or ((due or improved) and not over):
            self._save()
        if stopping:
            raise Preempted
        return over

    def _is_over(self) -> bool:
        return self.position.step >= self.total or 0 < self.run.patience <= self.position.bad_evals

    def _stopping(self, stop: StopSignal) -> bool:
        """Whether any process was told to stop."""
        return any_process(self.accelerator, stop.received)

    def _evaluation_due(self, step: int) -> bool:
        every, wanted = self.run.eval_every, bool(self.data.held_out) or self.figure is not None
        return wanted and (step == self.total or (every > 0 and step % every == 0))

    def _evaluate(self, model: Any, stop: StopSignal) -> bool:
        """Evaluate where the stage stands. Returns: whether it has never been better; no after SIGTERM."""
        loss = self.held_out_loss(model, stop) if self.data.held_out else None
        figure = of_main(self.accelerator, partial(self.figure, lambda: stop.received)) if self.figure else None
        if (self.data.held_out and loss is None) or (self.figure is not None and figure is None):
            return False
        found = {"eval_loss": loss, self.figure.name if self.figure else "": figure}
        self._log(**{key: value for key, value in found.items() if value is not None})
        self.position = self.position.judged(loss, figure)
        return self.position.bad_evals == 0

    def held_out_loss(self, model: Any, stop: StopSignal) -> float | None:
        """Loss per supervised token over the held-out samples; None if SIGTERM came in between.

        Raises: NumericError N301 if it is not finite.
        """
        loss = held_out_loss(self.accelerator, model, self.data, self.stage.batch.micro, lambda: self._stopping(stop))
        if loss is not None and not math.isfinite(loss):
            message = f"stage {self.name} step {self.position.step}: held-out loss {loss}."
            raise NumericError("N301", message, "lower optim.lr, or set optim.clip=1.0; the last checkpoint is good.")
        return loss

    def _take_best(self) -> None:
        """Bring back the weights of the stage's best evaluation, if a later one was worse."""
        best = self.position.best_step
        if best is not None and best != self.position.total:
            directory = resume.step_directory(self.run_dir, best)
            verify(directory)
            with sharding.whole(self.bundle.tuned, keep=True):
                checkpoint.restore_weights(self.bundle, directory)

    def _save(self) -> None:
        main, run = self.accelerator.is_main_process, self.run
        save = resume.save_checkpoint
        save(self.bundle, self.run_dir, self.position, self.optimizer, run.keep, self.facts, self.drift, main)
        self.accelerator.wait_for_everyone()

    def _log(self, **row: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        fs.append_line(self.run_dir / METRICS, json.dumps({"stage": self.name, "step": self.position.step, **row}))
        numbers = {f"{self.name}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        self.accelerator.log(numbers, step=self.position.total)
