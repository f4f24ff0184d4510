"""A whole run: check everything, then every stage from where the last checkpoint stands, then the report."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from vlmpeft import checkpoint, evaluation, fs, resume, retention, sharding, workspace
from vlmpeft.align import align
from vlmpeft.build import Bundle, assemble, choose_device, choose_dtype
from vlmpeft.config import to_yaml
from vlmpeft.distributed import failing_together, make_accelerator
from vlmpeft.errors import PREEMPTED
from vlmpeft.figure import EvalFigure, find_benchmark
from vlmpeft.loop import StageTrainer
from vlmpeft.manifest import verify, versions
from vlmpeft.parts import table_text
from vlmpeft.preflight import check_recipe, prepare_stages, refuse_sharded, start_lines
from vlmpeft.recipe import Recipe, Stage
from vlmpeft.report import write_report
from vlmpeft.resume import Position, checkpoints, position_of, save_checkpoint
from vlmpeft.stage import StageData, StageResult
from vlmpeft.start import start_from
from vlmpeft.stopping import Preempted, StopSignal

SUMMARY = "summary.json"
REPORT = "report.html"
CHECKPOINTS = 2.5  # there is room for so many before a stage starts: the newest two, and what the run writes besides


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
        check_recipe(self.recipe)
        self.benchmarks = evaluation.benchmarks(self.recipe.eval, self.recipe.data.images)
        self.best_by = find_benchmark(self.recipe.run.best_by, self.benchmarks)
        self.retained = retention.read_retention(self.recipe.retention)
        device = choose_device(self.recipe.run.device)
        self.dtype = choose_dtype(self.recipe.run.precision, device)
        self.accelerator = make_accelerator(
            device, self.dtype, self.recipe.run.timeout_s,
            log_with=list(self.recipe.run.trackers) or None, project_dir=str(self.dir / "trackers"),
        )  # fmt: skip
        with failing_together(self.accelerator):
            return self._locked()

    def _locked(self) -> int:
        """The run in its directory, which the main process holds. Returns: as `run`."""
        main = self.accelerator.is_main_process
        try:
            with workspace.locked(self.dir) if main else contextlib.nullcontext(), StopSignal() as stop:
                if main:
                    workspace.open_directory(self.dir, self.recipe)
                self.accelerator.wait_for_everyone()
                if workspace.finished(self.dir):
                    self._say(f"already complete: {self.dir / workspace.FINAL}")
                    if main and not (self.dir / REPORT).is_file():
                        self._report()
                    return 0
                try:
                    self._run(stop)
                finally:
                    self.accelerator.end_training()
        except Preempted:
            self._say(self._how_to_go_on())
            return PREEMPTED
        return 0

    def _run(self, stop: StopSignal) -> None:
        with stop.at_once():  # nothing is trained yet, so there is nothing to save
            config = {"recipe": to_yaml(self.recipe)}
            self.accelerator.init_trackers(self.recipe.run.project, config=config)
            title, kind = self.recipe.title or "run", str(self.dtype).removeprefix("torch.")
            self._say(f"{title}: {self.accelerator.device.type}, {kind}, into {self.dir}")
            if sharding.wanted(self.accelerator):
                refuse_sharded(self.recipe)
            bundle, position, found = self._bundle()
            for line in start_lines(bundle, self.accelerator.device.type):
                self._say(line)
            stages, facts = prepare_stages(bundle, self.dir, self._say)
            if found is not None:
                workspace.check_data(found, facts)
            if found is None or "before" not in evaluation.read(self.dir):
                self._evaluate(bundle, "before")
            if found is None:
                self._retain(bundle, "before")
            if found is None and self.recipe.align.epochs and self.recipe.init is None:
                self._align(bundle, stages)
        self._train(bundle, stages, facts, position, found, stop)
        with stop.at_once():  # the end of the last stage is saved
            self._evaluate(bundle, "after")
            self._retain(bundle, "after")
            for ablation in self.recipe.eval.ablations:
                self._evaluate(bundle, ablation)
        if self.accelerator.is_main_process:
            checkpoint.save(bundle, self.dir / workspace.FINAL, lambda _: {"facts": facts})
            self._report()
        self.accelerator.wait_for_everyone()

    def _bundle(self) -> tuple[Bundle, Position, Path | None]:
        """The model at the newest good checkpoint, at `init`, or bare. Returns: bundle, position, checkpoint."""
        found = workspace.find_checkpoint(self.dir, self.recipe)
        bundle = assemble(self.recipe, self.accelerator.device, self.dtype, self.recipe.run.seed)
        position = Position()
        if found is not None:
            checkpoint.restore(bundle, found, verify(found))
            position = workspace.known_best(self.dir, position_of(found))
            self._say(f"going on from {found}")
            before, now = position.processes, self.accelerator.num_processes
            if before != now:
                self._say(f"trained by {before} processes so far, now by {now}: the same samples, other rounding")
        elif self.recipe.init is not None:
            start_from(bundle.model, self.recipe, bundle.fingerprints, self.recipe.init)
        if self.accelerator.is_main_process:
            workspace.cut_metrics(self.dir, list(self.recipe.stages), position)
        return bundle, position, found

    def _align(self, bundle: Bundle, stages: dict[str, StageData]) -> None:
        """Word alignment of the fresh projector; the end of the first stage's steps is where it is first saved."""
        wanted = self.recipe.align.source
        chosen = [stages[name] for name, s in self.recipe.stages.items() if wanted in ("all", s.source)]
        samples = itertools.chain.from_iterable(data.train for data in chosen)
        load = next(iter(stages.values())).load

        def whole(path: Path) -> Tensor:
            """The first view, which shows all of an image."""
            return load(path)[0]

        new = bundle.tokenizer.convert_tokens_to_ids(list(self.recipe.tokens.add))  # their rows say nothing yet
        excluded = [*bundle.tokenizer.all_special_ids, *new]
        loss = align(bundle.model, samples, whole, self.recipe.align, excluded, self.recipe.run.seed)
        self._say("align: no word to align with" if loss is None else f"align: loss {loss:.3f} in the last epoch")

    def _train(
        self,
        bundle: Bundle,
        stages: dict[str, StageData],
        facts: dict[str, Any],
        position: Position,
        found: Path | None,
        stop: StopSignal,
    ) -> None:
        """Train what is left of every stage; the end of each is a checkpoint."""
        results = self._earlier_results(position)
        for index, (name, stage) in list(enumerate(self.recipe.stages.items()))[position.stage :]:
            figure = self._figure(bundle, stage) if index + 1 == len(self.recipe.stages) else None
            trainer = StageTrainer(
                bundle, name, stage, stages[name], self.recipe.run, self.dir, self.accelerator, position, facts, figure
            )
            if found is not None and position.step > 0:
                trainer.resume(found)
            self._say(table_text(name, bundle.tuned.table()))
            fs.require_room(self.dir, round(CHECKPOINTS * resume.checkpoint_bytes(bundle)))
            results.append(trainer.train(stop))
            main, processes = self.accelerator.is_main_process, self.accelerator.num_processes
            position = Position(stage=index + 1, total=trainer.position.total, processes=processes)
            if main:
                self._summarise(results, facts)
            saved = save_checkpoint(bundle, self.dir, position, None, self.recipe.run.keep, facts, main=main)
            self.accelerator.wait_for_everyone()
            stop.check()
            if trainer.sharded:
                checkpoint.reload(bundle, saved, self.accelerator.device, self.dtype)

    def _figure(self, bundle: Bundle, stage: Stage) -> EvalFigure | None:
        if self.best_by is None:
            return None
        return EvalFigure(self.recipe.run.best_by, self.best_by, bundle, self.recipe.eval, stage)

    def _evaluate(self, bundle: Bundle, moment: str) -> None:
        """Ask the questions with the template of the last stage, whichever stage the model is in."""
        if not (self.benchmarks and self.accelerator.is_main_process):
            return
        stage, bundle.stage = bundle.stage, list(self.recipe.stages.values())[-1]
        self._say(f"evaluation: {moment}")
        try:
            evaluation.evaluate(bundle, self.recipe.eval, self.benchmarks, self.dir, moment)
        finally:
            bundle.stage = stage

    def _retain(self, bundle: Bundle, moment: str) -> None:
        """Measure what the language model still knows without images."""
        if self.retained is None or not self.accelerator.is_main_process:
            return
        self._say(f"retention: {moment}")
        found = retention.evaluate(bundle, self.retained, self.recipe.retention.batch_size)
        retention.keep(self.dir, moment, found)
        self.accelerator.log({f"retention/{key}_{moment}": value for key, value in found.items()})

    def _earlier_results(self, position: Position) -> list[StageResult]:
        path = self.dir / SUMMARY
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else []
        return [StageResult(**s) for s in stages[: position.stage]]

    def _summarise(self, results: list[StageResult], facts: dict[str, Any]) -> None:
        counts = {k: sum(f[k] for f in facts["data"].values()) for k in ("records", "used", "skipped", "animated")}
        stages = [dataclasses.asdict(result) for result in results]
        summary = {"title": self.recipe.title, "stages": stages, "versions": dict(versions()), "data": counts}
        fs.write_json(self.dir / SUMMARY, summary)

    def _report(self) -> None:
        """Write the report from the files of the run, and say the end of it."""
        if self.benchmarks:
            evaluation.write_samples(self.benchmarks, self.dir)
        report = write_report(self.dir)
        self._say(f"{self._headline()}model:  {self.dir / workspace.FINAL}\nreport: {report}")

    def _headline(self) -> str:
        lines = []
        scores = evaluation.read(self.dir)
        for i, benchmark in enumerate(self.benchmarks):
            moments = [m for m in ("before", "after", *evaluation.ABLATIONS) if i < len(scores.get(m, []))]
            parts = [f"{moment} {scores[moment][i]['accuracy']:.1%}" for moment in moments]
            lines.append(f"{benchmark.name} accuracy: {', '.join(parts)}\n")
        return "".join(lines) + retention.headline(self.dir)

    def _how_to_go_on(self) -> str:
        command = "the same command, but without run.overwrite" if self.recipe.run.overwrite else "the same command"
        where = f"checkpoint in {self.dir / 'checkpoints'}" if checkpoints(self.dir) else "nothing was trained yet"
        return f"stopped by SIGTERM; go on with {command} ({where})"

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)
