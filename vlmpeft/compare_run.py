"""One run of a comparison: from the shared start train an arm, measure what it cost, ask it, and keep the answers."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmpeft import fs
from vlmpeft.build import Bundle, assemble, choose_device, choose_dtype
from vlmpeft.compare_plan import Plan, Row, Task
from vlmpeft.config import to_yaml
from vlmpeft.distributed import make_accelerator
from vlmpeft.errors import PREEMPTED
from vlmpeft.eval.paths import resolve_images
from vlmpeft.features import cache_features
from vlmpeft.images import ImageReader
from vlmpeft.loop import StageTrainer
from vlmpeft.margins import YesNo
from vlmpeft.peak_memory import PeakMemory
from vlmpeft.preflight import check_recipe, prepare_stages
from vlmpeft.recipe import Recipe
from vlmpeft.resume import Position
from vlmpeft.run import Run
from vlmpeft.start import start_from
from vlmpeft.steering import lmar
from vlmpeft.steering.statistics import numbers
from vlmpeft.stopping import Preempted, StopSignal
from vlmpeft.tune import Tuned
from vlmpeft.weights import PROJECTOR
from vlmpeft.workspace import FINAL, finished

Load = Callable[[Path], Tensor]


class Base:
    """The frozen parts, loaded once a process; every run gets a copy of its own, so none can leave a trace in another.

    Args: device, dtype: of all runs.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._key = ""
        self._bundle: Bundle | None = None

    def fresh(self, recipe: Recipe) -> Bundle:
        """What `assemble` gives for a recipe."""
        data = recipe.data
        key = repr((recipe.vision, recipe.language, recipe.projector, recipe.quant, recipe.tokens, recipe.run.seed))
        key += repr((data.image_mode, data.tiles, data.tile_merge, data.max_image_pixels))
        if key != self._key or self._bundle is None:
            self._bundle = None  # before the next is loaded, not after
            self._key, self._bundle = key, assemble(recipe, self.device, self.dtype, recipe.run.seed)
        model = copy.deepcopy(self._bundle.model)
        stage = list(recipe.stages.values())[-1]
        return dataclasses.replace(
            self._bundle, model=model, tuned=Tuned(model, model.parts), recipe=recipe, stage=stage
        )


class Runner:
    """Makes the runs of a plan, one after the other, in the comparison's directory."""

    def __init__(self, plan: Plan, directory: Path, stop: StopSignal) -> None:
        self.plan, self.directory, self.stop = plan, directory, stop
        recipe = plan.recipe(Task(plan.first, plan.comparison.reference, plan.comparison.seeds[0], None, False))
        device = choose_device(recipe.run.device)
        self.base = Base(device, choose_dtype(recipe.run.precision, device))
        self.accelerator = make_accelerator(device, self.base.dtype, recipe.run.timeout_s)
        self._features: dict[str, Load] = {}

    def __call__(self, task: Task) -> dict[str, Any]:
        """Train and ask. Returns: the result, ready for JSON."""
        recipe, start = self.plan.recipe(task), self._start(task)
        check_recipe(recipe)
        bundle = self.base.fresh(recipe)
        if start is not None:
            start_from(bundle.model, bundle.recipe, bundle.fingerprints, start)
        where = self.directory / "runs" / task.file
        fs.remove(where)
        where.mkdir(parents=True)
        fs.write_text(where / "recipe.yaml", to_yaml(recipe))
        with PeakMemory(self.base.device) as memory:
            trained = self._train(bundle, recipe, task, where) if self.plan.comparison.arms[task.arm].train else {}
        with self.stop.at_once():
            found = {**trained, "peak_bytes": memory.bytes if trained else None, **_sizes(bundle, where)}
            return {**dataclasses.asdict(task), **found, **self._asked(bundle, task)}

    def _start(self, task: Task) -> str | None:
        """The model directory all arms of a set and seed start from, made when it is first needed."""
        recipe = self.plan.start(task)
        if recipe is None:
            return self.plan.init(task)
        directory = Path(recipe.run.dir)
        if not finished(directory) and Run(recipe, directory).run() == PREEMPTED:
            raise Preempted
        return str(directory / FINAL)

    def _train(self, bundle: Bundle, recipe: Recipe, task: Task, where: Path) -> dict[str, Any]:
        (name, stage), *_ = recipe.stages.items()
        stages, facts = prepare_stages(bundle, where, lambda _: None)
        trainer = StageTrainer(
            bundle, task.name, stage, stages[name], recipe.run, where, self.accelerator, Position(), facts
        )
        done = trainer.train(self.stop)
        return {"steps": done.steps, "seconds_per_step": done.seconds / done.steps, "loss": done.final_loss}

    def _asked(self, bundle: Bundle, task: Task) -> dict[str, Any]:
        """Margins of the questions, and what the attention does on the set's first images."""
        rows, size = self.plan.asked(task), self.plan.comparison.batch_size
        margins = self._questions(bundle, task.set, rows).margins(bundle, size)
        found: dict[str, Any] = {"questions": [str(row["question_id"]) for row in rows]}
        found["margins"] = [float(f"{margin:.6g}") for margin in margins]
        if self.plan.comparison.lmar and not task.sweep:
            with lmar(bundle.model, bundle.parts) as probe:
                self._questions(bundle, task.set, self.plan.probed(task.set)).margins(bundle, size)
            found |= {"lmar": numbers(probe.ratio()), "visual_mass": numbers(probe.mass())}
        return found

    def _questions(self, bundle: Bundle, name: str, rows: Sequence[Row]) -> YesNo:
        chosen = self.plan.comparison.sets[name]
        folder = chosen.images or bundle.recipe.data.images or ""
        return YesNo(bundle, rows, folder, self._load(bundle, name, folder), chosen.suffix)

    def _load(self, bundle: Bundle, name: str, folder: str) -> Load:
        """How the images of a set become what the projector reads: their features, where the recipe caches them."""
        read = ImageReader(bundle.image_transform)
        if not bundle.recipe.data.cache_features:
            return read
        if name not in self._features:
            vision: Any = bundle.model.vision
            self._features[name] = cache_features(vision, read, resolve_images(self.plan.rows[name], folder))
        return self._features[name]


def _sizes(bundle: Bundle, where: Path) -> dict[str, Any]:
    """Trained parameters of each part, and the bytes of what `save` writes for the projector and for the rest."""
    rows: list[Mapping[str, Any]] = list(bundle.tuned.table())
    counts = {str(row["part"]): int(row["trainable"]) for row in rows}
    language = counts.get("language", 0) + counts.get("lm_head", 0)
    with tempfile.TemporaryDirectory(dir=where) as folder:
        bundle.tuned.save(Path(folder))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        projector = sum(path.stat().st_size for path in files if path.name == PROJECTOR)
        adapter = sum(path.stat().st_size for path in files) - projector
    return {
        "trainable_language": language, "trainable_projector": counts.get("projector", 0),
        "trainable": sum(counts.values()), "adapter_bytes": adapter, "projector_bytes": projector,
    }  # fmt: skip
