"""A whole run: check everything, then every stage from where the last checkpoint stands, then the report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vlmpeft import checkpoint, evaluation, fs
from vlmpeft.build import Bundle, assemble, choose_device, choose_dtype, enter_stage
from vlmpeft.checkpoint import Position
from vlmpeft.config import load_recipe, to_yaml
from vlmpeft.data import Prepared, prepare, split_held_out, supervised_share
from vlmpeft.errors import PREEMPTED, CheckpointError, ConfigError
from vlmpeft.features import cache_features
from vlmpeft.images import open_image
from vlmpeft.loop import METRICS, Preempted, StageData, StageResult, StageTrainer, StopSignal
from vlmpeft.recipe import Recipe, Stage
from vlmpeft.report import write_report
from vlmpeft.schema import as_plain
from vlmpeft.template import TurnEncoder

SUMMARY = "summary.json"
MAY_CHANGE = ("run", "eval", "title", "imports")  # sections of a recipe that may differ on resume


class Run:
    """One run of a recipe in its directory.

    Args:
        recipe: what to do.
        directory: where everything goes; locked while the run lives.
    """

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.dir = recipe, directory

    def run(self) -> int:
        """Train, evaluate, report. Returns: 0, or 143 after SIGTERM."""
        self._check_files()
        with locked(self.dir):
            if (final := self._open()) is not None:
                print(f"already complete: {final}")
                return 0
            try:
                with StopSignal() as stop:
                    self._run(stop)
            except Preempted:
                print(f"stopped by SIGTERM; go on with the same command (checkpoint in {self.dir / 'checkpoints'})")
                return PREEMPTED
        return 0

    def _check_files(self) -> None:
        """What can be wrong without a model is found before anything is written."""
        for name, stage in self.recipe.stages.items():
            if getattr(self.recipe.data, stage.source) is None:
                raise ConfigError("C106", f"stage {name} reads data.{stage.source}, which is not set.", f"write data.{stage.source}=FILE data.images=DIR.")
            if not stage.tuners:
                raise ConfigError("C106", f"stage {name} trains nothing.", "give it a tuner, for example lora.r=16.")
            path = Path(str(getattr(self.recipe.data, stage.source)))
            if not path.is_file():
                raise ConfigError("C110", f"data.{stage.source}={path}: no such file.", f"check data.{stage.source}.")
        if self.recipe.data.images and not Path(self.recipe.data.images).is_dir():
            raise ConfigError("C110", f"data.images={self.recipe.data.images}: no such folder.", "check data.images.")
        self.benchmarks = evaluation.benchmarks(self.recipe.eval, self.recipe.data.images)
        if self.dir.exists() and not self.dir.is_dir():
            raise ConfigError("C111", f"run.dir={self.dir} is a file.", "choose another run.dir.")

    def _open(self) -> Path | None:
        """Make the directory ready: fresh, or with a run of the same recipe to go on with. Returns: `final` if it is complete."""
        run = self.recipe.run
        fs.sweep(self.dir)
        fs.sweep(self.dir / "checkpoints")
        used = (self.dir / "recipe.yaml").is_file()
        if used and run.overwrite:
            moved = self.dir.with_name(f"{self.dir.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            moved.mkdir()
            for path in [p for p in self.dir.iterdir() if p.name != LOCK]:
                os.replace(path, moved / path.name)
            used = False
        if used and run.resume == "never":
            raise ConfigError("C112", f"run.dir={self.dir} holds a run.", "set run.resume=auto, run.overwrite=true or another run.dir.")
        if used:
            self._compare_recipes()
            if (self.dir / "final" / checkpoint.MANIFEST).is_file():
                checkpoint.verify(self.dir / "final")
                return self.dir / "final"
        fs.write_text(self.dir / "recipe.yaml", to_yaml(self.recipe))
        return None

    def _compare_recipes(self) -> None:
        old = as_plain(load_recipe(str(self.dir / "recipe.yaml")))
        new = as_plain(self.recipe)
        for values in (old, new):
            for section in MAY_CHANGE:
                values.pop(section, None)
        changed = [f"{key} {a!r} -> {b!r}" for key, a, b in _differences(old, new)]
        if changed:
            raise CheckpointError("K210", f"{self.dir} holds a run of another recipe: {'; '.join(changed[:8])}.", "set run.overwrite=true or another run.dir.")

    def _run(self, stop: StopSignal) -> None:
        recipe = self.recipe
        device = choose_device(recipe.run.device)
        dtype = choose_dtype(recipe.run.precision, device)
        accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
            log_with=list(recipe.run.trackers) or None, project_dir=str(self.dir / "trackers"),
        )  # fmt: skip
        accelerator.init_trackers(recipe.run.project, config={"recipe": to_yaml(recipe)})
        tqdm.write(f"{recipe.title or 'run'}: {device.type}, {str(dtype).removeprefix('torch.')}, into {self.dir}")
        bundle, position, resumed = self._bundle(accelerator.device, dtype)
        stages = self._stages(bundle)
        self._evaluate(bundle, "before", skip=resumed is not None)
        results: list[StageResult] = self._earlier_results(position)
        for index, (name, stage) in enumerate(recipe.stages.items()):
            if index < position.stage:
                continue
            data, facts = stages[name]
            trainer = StageTrainer(bundle, name, stage, data, recipe.run, self.dir, accelerator, position, facts)
            if resumed is not None and position.step > 0:
                trainer.resume(resumed)
            tqdm.write(trainable_table(name, bundle))
            results.append(trainer.train(stop))
            position = Position(stage=index + 1, total=trainer.position.total)
            self._summarise(results)
            last = index == len(recipe.stages) - 1
            target = self.dir / "final"
            if not last:
                checkpoint.save_checkpoint(bundle, self.dir, position, None, recipe.run.keep, facts)
        self._evaluate(bundle, "after")
        if recipe.eval.blank:
            self._evaluate(bundle, "blank")
        checkpoint.save(bundle, target, lambda _: {"facts": facts})
        if self.benchmarks:
            evaluation.write_samples(self.benchmarks, self.dir)
        accelerator.end_training()
        report = write_report(self.dir)
        print(self._headline())
        print(f"model:  {target}\nreport: {report}")

    def _bundle(self, device: torch.device, dtype: torch.dtype) -> tuple[Bundle, Position, Path | None]:
        """The model at the newest good checkpoint, at `init`, or bare. Returns: bundle, position, checkpoint."""
        recipe = self.recipe
        found, rejected = self._checkpoint()
        for reason in rejected:
            tqdm.write(f"vlmpeft: warning: passed over a damaged checkpoint: {reason}")
        bundle = assemble(recipe, device, dtype, recipe.run.seed)
        if found is not None:
            manifest = checkpoint.verify(found)
            checkpoint.restore(bundle, found, manifest)
            position = checkpoint.position_of(found)
            tqdm.write(f"going on from {found}")
            self._cut_metrics(position)
            return bundle, position, found
        if recipe.init is not None:
            checkpoint.start_from(bundle, Path(recipe.init))
        self._cut_metrics(Position())
        return bundle, Position(), None

    def _checkpoint(self) -> tuple[Path | None, list[str]]:
        if self.recipe.run.resume in ("auto", "never"):
            return checkpoint.newest_valid(self.dir)
        directory = Path(self.recipe.run.resume)
        if not (directory / checkpoint.STATE).is_file():
            raise CheckpointError("K205", f"run.resume={directory} is no checkpoint.", "name a checkpoints/step-N folder, auto or never.")
        return directory, []

    def _cut_metrics(self, position: Position) -> None:
        """Drop logged steps that will be trained again."""
        path = self.dir / METRICS
        names = list(self.recipe.stages)
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
        kept = [r for r in rows if (names.index(r["stage"]), r["step"]) <= (position.stage, position.step)]
        fs.write_text(path, "".join(json.dumps(r) + "\n" for r in kept))

    def _stages(self, bundle: Bundle) -> dict[str, tuple[StageData, dict[str, Any]]]:
        """Check and encode the data of every stage before the first one trains."""
        data = self.recipe.data
        prepared: dict[str, tuple[Stage, Prepared]] = {}
        for name, stage in self.recipe.stages.items():
            encoder = TurnEncoder(bundle.tokenizer, stage.template, bundle.image_tokens, stage.system)
            found = prepare(Path(str(getattr(data, stage.source))), data, encoder, stage.turns == "independent", self.dir / f"bad_samples-{name}.jsonl")
            supervised, tokens = supervised_share(found.samples)
            line = f"{name}: records {found.records:,} = used {len(found.samples):,} + skipped {len(found.skipped):,}"
            tqdm.write(f"{line}; {supervised:,} of {tokens:,} tokens supervised ({supervised / tokens:.1%})")
            prepared[name] = (stage, found)
        load: Any = lambda path: bundle.image_transform(open_image(path))  # noqa: E731
        workers = data.workers
        if data.cache_features:
            paths = [path for _, found in prepared.values() for s in found.samples for path in s.images]
            if paths:
                load, workers = cache_features(bundle.model.vision, bundle.image_transform, paths), 0  # type: ignore[arg-type]
        out: dict[str, tuple[StageData, dict[str, Any]]] = {}
        for name, (_, found) in prepared.items():
            train, held_out = split_held_out(found.samples, data.held_out, self.recipe.run.seed)
            facts = {"data": {"file": str(getattr(data, self.recipe.stages[name].source)), "fingerprint": found.fingerprint, "used": len(found.samples), "skipped": len(found.skipped)}}
            out[name] = (StageData(train, held_out, load, workers), facts)
        self.records = {"records": sum(f.records for _, f in prepared.values()), "used": sum(len(f.samples) for _, f in prepared.values()), "skipped": sum(len(f.skipped) for _, f in prepared.values())}
        return out

    def _evaluate(self, bundle: Bundle, moment: str, skip: bool = False) -> None:
        if self.benchmarks and not (skip and moment in evaluation.read(self.dir)):
            stage = bundle.stage
            enter_last = list(self.recipe.stages.values())[-1]
            bundle.stage = enter_last
            tqdm.write(f"evaluation: {moment}")
            evaluation.evaluate(bundle, self.recipe.eval, self.benchmarks, self.dir, moment)
            bundle.stage = stage

    def _earlier_results(self, position: Position) -> list[StageResult]:
        path = self.dir / SUMMARY
        stages = json.loads(path.read_text())["stages"] if path.is_file() else []
        return [StageResult(**s) for s in stages[: position.stage]]

    def _summarise(self, results: list[StageResult]) -> None:
        stages = []
        for result in results:
            stages.append(dataclasses.asdict(result))
        fs.write_json(self.dir / SUMMARY, {"title": self.recipe.title, "stages": stages, "versions": checkpoint.versions(), "data": self.records})

    def _headline(self) -> str:
        lines = []
        scores = evaluation.read(self.dir)
        for i, benchmark in enumerate(self.benchmarks):
            parts = [f"{moment} {scores[moment][i]['accuracy']:.1%}" for moment in ("before", "after", "blank") if moment in scores]
            lines.append(f"{benchmark.name} accuracy: {', '.join(parts)}")
        return "\n".join(lines)


def trainable_table(stage: str, bundle: Bundle) -> str:
    """The trainable parameters of a stage, per part."""
    rows = bundle.tuned.table()
    lines = [f"{stage}: trainable parameters"]
    for row in rows:
        share = int(str(row["trainable"])) / max(1, int(str(row["total"])))
        lines.append(f"  {row['part']:<10} {row['trainable']:>13,} of {row['total']:>15,}  {share:7.2%}  {', '.join(row['tuners'])}")  # type: ignore[arg-type]
    return "\n".join(lines)


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    return [] if old == new else [(where, old, new)]


LOCK = "run.lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process. Raises: CheckpointError K211 while another process trains there."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / LOCK
    if lock.is_file():
        pid, _, host = lock.read_text().strip().partition(" ")
        if host == socket.gethostname() and pid.isdigit() and int(pid) != os.getpid() and Path(f"/proc/{pid}").exists():
            raise CheckpointError("K211", f"process {pid} on {host} trains in {directory}.", "wait for it, or choose another run.dir.")
    fs.write_text(lock, f"{os.getpid()} {socket.gethostname()}\n")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
