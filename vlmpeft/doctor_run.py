"""The examination of a whole run before it starts: machine, directory, model, then every stage as it would train."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

from vlmpeft import checkpoint, evaluation, fs, retention, workspace
from vlmpeft.build import Bundle, assemble, choose_device, choose_dtype
from vlmpeft.data import Loaded
from vlmpeft.distributed import make_accelerator
from vlmpeft.doctor_stage import choose, enter, examine_batch, examine_records, examine_tuning
from vlmpeft.errors import ModelError, VlmpeftError
from vlmpeft.figure import find_benchmark
from vlmpeft.findings import Findings
from vlmpeft.manifest import verify, versions
from vlmpeft.optim_memory import optimizer_bytes
from vlmpeft.preflight import check_recipe, start_lines
from vlmpeft.recipe import Recipe
from vlmpeft.resume import position_of
from vlmpeft.round_trip import compare_logits, logits_of_batch, size_of, writes_of
from vlmpeft.start import start_from
from vlmpeft.unchanged import not_finite
from vlmpeft.weights import assign

RUN = "run"  # where what concerns no stage is found


class Examination:
    """Examines one recipe. Nothing is written into its directory.

    Args: found: takes what is found.
    """

    def __init__(self, recipe: Recipe, found: Findings) -> None:
        self.recipe, self.found = recipe, found
        self.directory = Path(recipe.run.dir)
        self.samples: dict[str, int] = {}  # of an epoch, by stage
        self.written = self.optimizer = 0  # bytes of the largest stage

    def run(self) -> None:
        """Make every check that the ones before it allow."""
        with self.found.judging(RUN, "recipe"):
            check_recipe(self.recipe)
            asked = evaluation.benchmarks(self.recipe.eval, self.recipe.data.images)
            find_benchmark(self.recipe.run.best_by, asked)
            retention.read_retention(self.recipe.retention)
            self.found.add("ok", RUN, "recipe", f"stages {', '.join(self.recipe.stages)}; question files: {len(asked)}")
            with self.found.judging(RUN, "machine"):
                self._machine()
                with self.found.judging(RUN, "model"):
                    first = self._model()
                    for name in list(self.recipe.stages)[first:]:
                        self._stage(name)
        if self.written:
            with self.found.judging(RUN, "disk"):
                self._disk()

    def _machine(self) -> None:
        device = choose_device(self.recipe.run.device)
        self.dtype, run = choose_dtype(self.recipe.run.precision, device), self.recipe.run
        self.accelerator: Accelerator = make_accelerator(device, self.dtype, run.timeout_s)
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        has = [f"{name} {version}" for name, version in versions().items() if name in ("torch", "transformers")]
        uses = self.recipe.quant.bits or any(s.optim.name != "adamw" for s in self.recipe.stages.values())
        has += [f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"] if uses else []
        cores, workers = len(os.sched_getaffinity(0)), self.recipe.data.workers
        text = f"{kind}, {str(self.dtype).removeprefix('torch.')}; {', '.join(has)}; data.workers={workers}"
        self.found.add("ok", RUN, "machine", f"{text} on {cores} processors")
        if workers > cores:
            self.found.add("note", RUN, "machine", f"data.workers={workers} on {cores} processors: they share them")

    def _model(self) -> int:
        """Load the model where the run would start from. Returns: index of the first stage that is left to train."""
        words, going_on = workspace.foresee(self.directory, self.recipe)
        self.found.add("note" if going_on else "ok", RUN, "directory", f"run.dir={self.directory}: {words}")
        self.bundle: Bundle = assemble(self.recipe, self.accelerator.device, self.dtype, self.recipe.run.seed)
        if broken := not_finite(dict(self.bundle.model.named_parameters())):
            message = f"the base weight {broken[0]} holds NaN or infinity ({len(broken)} such)."
            raise ModelError("M595", message, "fetch the weights again.")
        if going_on is not None:
            checkpoint.restore(self.bundle, going_on, verify(going_on))
        elif self.recipe.init is not None:
            start_from(self.bundle.model, self.recipe, self.bundle.fingerprints, self.recipe.init)
        parameters = sum(p.numel() for p in self.bundle.model.parameters())
        size = f"{parameters:,} numbers in memory, all finite; {self.bundle.image_tokens} tokens a view of an image"
        self.found.add("ok", RUN, "model", size)
        for line in start_lines(self.bundle, self.accelerator.device.type):
            self.found.add("note", RUN, "model", line)
        return 0 if going_on is None else position_of(going_on).stage

    def _stage(self, name: str) -> None:
        """Every check of a stage; the first that fails ends it."""
        at = "tuners"
        try:
            enter(self.bundle, name, self.found)
            at = "records"
            data = examine_records(self.bundle, name, self.found)
            self.samples[name] = data.epoch
            at = "batch"
            chosen = choose(self.recipe.stages[name], data.train, self.recipe.run.seed)
            loaded = examine_batch(self.bundle, name, data, chosen, self.found)
            at = "gradients"
            start = examine_tuning(self.bundle, name, data, loaded, self.accelerator, self.found)
            at = "checkpoint"
            self._round_trip(name, loaded)
            assign(self.bundle.tuned.trainable(), start)
        except VlmpeftError as error:
            self.found.add("FAIL", name, at, error.message, error)

    def _round_trip(self, name: str, loaded: Loaded) -> None:
        """Save what the steps made, forget it, load it and compare; `self.bundle` is the loaded one afterwards.

        Raises: CheckpointError K201, K208; ModelError.
        """
        trained = self.bundle.tuned.trainable()
        parameters = sum(p.numel() for p in self.bundle.model.projector.parameters())
        with tempfile.TemporaryDirectory(prefix="vlmpeft-doctor-") as folder:
            place = Path(folder)
            fs.require_room(place, 4 * (sum(p.numel() for p in trained.values()) + parameters))
            checkpoint.save(self.bundle, place / workspace.FINAL)
            size = size_of(place)
            if size > self.written:
                self.written = size
                self.optimizer = optimizer_bytes(self.recipe.stages[name].optim.name, trained.values())
            before, transform = logits_of_batch(self.bundle, loaded.batch, self.dtype), self.bundle.image_transform
            del trained, self.bundle  # or two models would be in memory
            self.bundle = checkpoint.load(place / workspace.FINAL, self.accelerator.device.type, self.dtype)
            after = logits_of_batch(self.bundle, loaded.batch, self.dtype)
            same = compare_logits(before, after, place / workspace.FINAL)
        if self.bundle.image_transform != transform:
            raise ModelError("M596", "the image settings that were saved are not those that load.", "report this.")
        self.found.add("ok", name, "checkpoint", f"{size / 2**20:.1f} MiB saved and loaded again: {same}")

    def _disk(self) -> None:
        """Raise CheckpointError K201 if the run would fill the disk."""
        writes = writes_of(self.recipe, self.samples, self.written, self.optimizer)
        free = fs.require_room(self.directory, writes.most)
        text = f"up to {writes.most / 2**20:.1f} MiB, {writes.checkpoint / 2**20:.1f} a checkpoint"
        self.found.add("ok", RUN, "disk", f"{text}; {free / 2**30:.1f} GiB free at {self.directory}")
