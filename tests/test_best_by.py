"""`run.best_by`: a figure of an evaluation chooses the best checkpoint; and questions asked without their images."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from runs import in_child, make_bundle, make_trainer, metrics, run_train, signal_at, tensors

from vlmpeft import figure
from vlmpeft.build import Bundle
from vlmpeft.checkpoint import load
from vlmpeft.config import load_recipe
from vlmpeft.errors import EnvironmentFault
from vlmpeft.eval import pope
from vlmpeft.evaluation import benchmarks
from vlmpeft.figure import EvalFigure, figures
from vlmpeft.loop import StageTrainer
from vlmpeft.preflight import refuse_sharded
from vlmpeft.resume import Position
from vlmpeft.template import TurnEncoder

NAME, AUC = "eval.pope.accuracy", "eval.pope.auc"
SCRIPT = (0.5, 0.75, 0.5, 0.75, 0.25, 0.25)  # after steps 5 to 10 of the run; equal is not better


def options(data_dir: Path, *more: str) -> tuple[str, ...]:
    """A run of 4 and 6 steps that is evaluated after each step of its last stage."""
    asked = (f"eval.questions={data_dir / 'pope.jsonl'}", "eval.blank=false", "eval.max_new_tokens=3")
    return (*asked, "stages.pretrain.optim.steps=2", "stages.instruct.optim.steps=6", "run.keep=50", *more)


def test_the_best_is_the_first_highest_figure_and_else_the_lowest_loss() -> None:
    start = Position(total=4)
    first = start.judged(2.0, 0.5)
    assert (first.evaluated, first.best_loss, first.best_figure, first.best_step) == (True, 2.0, 0.5, 4)
    assert first.judged(1.0, 0.5) == Position(total=4, best_loss=2.0, best_figure=0.5, best_step=4, bad_evals=1)
    assert first.judged(3.0, 0.6).best_figure == 0.6
    lower = start.judged(2.0, None).judged(1.0, None)
    assert (lower.best_loss, lower.bad_evals) == (1.0, 0)
    assert lower.judged(1.0, None).judged(1.5, None).bad_evals == 2


def test_figures_are_scores_by_the_way_to_them_and_no_counts() -> None:
    found = {
        "accuracy": 0.5,
        "n": 4,
        "accuracy_ci95": [0.1, 0.9],
        "yes_ratio": 0.5,
        "settings": {"random": {"f1": 0.25}},
    }
    assert dict(figures(found, "eval.pope")) == {"eval.pope.accuracy": 0.5, "eval.pope.settings.random.f1": 0.25}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eval.pope.acuracy", "no such figure; did you mean 'eval.pope.accuracy'? (known: eval.pope.accuracy, eval."),
        ("eval.popee.f1", "did you mean 'eval.pope.f1'?"),
        ("los", "did you mean 'loss'?"),
        ("eval.pope.n", "no such figure"),
    ],
)
def test_a_wrong_name_is_one_line_before_anything_loads(
    name: str, said: str, tiny_recipe: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(tiny_recipe, tmp_path / "run", *options(data_dir, f"run.best_by={name}")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vlmpeft: error[C102] run.best_by={name}: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_figure_without_questions_is_refused(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(tiny_recipe, tmp_path / "run", f"run.best_by={NAME}") == 2
    assert f"error[C106] run.best_by={NAME}, but no eval.questions." in capsys.readouterr().err


def test_sharded_models_keep_to_the_loss(tiny_recipe: Path) -> None:
    refuse_sharded(load_recipe(str(tiny_recipe)))
    with pytest.raises(EnvironmentFault, match=r"E433.*run\.best_by"):
        refuse_sharded(load_recipe(str(tiny_recipe), [f"run.best_by={NAME}"]))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StageTrainer._evaluate

    def evaluate(self: StageTrainer, model: Any, stop: Any) -> bool:
        monkeypatch.setattr(EvalFigure, "__call__", lambda *_: SCRIPT[self.position.step - 1])
        return original(self, model, stop)

    monkeypatch.setattr(StageTrainer, "_evaluate", evaluate)


@pytest.mark.usefixtures("scripted")
def test_the_last_stage_ends_with_the_weights_of_its_best_figure_killed_or_not(
    tiny_recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    chosen = options(data_dir, f"run.best_by={NAME}", "run.eval_every=1", "data.held_out=0.25", "run.patience=4")
    assert run_train(tiny_recipe, tmp_path / "a", *chosen) == 0
    rows = [row for row in metrics(tmp_path / "a") if NAME in row]
    assert [(row["stage"], float.fromhex(row[NAME])) for row in rows] == [("instruct", s) for s in SCRIPT]
    assert all("eval_loss" in row for row in rows)
    stages = json.loads((tmp_path / "a" / "summary.json").read_text())["stages"]
    assert [stage["best_step"] for stage in stages][1] == 4
    best = tensors(tmp_path / "a" / "checkpoints" / "step-4")
    assert tensors(tmp_path / "a" / "final") == {k: v for k, v in best.items() if k != "optimizer.safetensors"}
    assert 'data-name="eval.pope.accuracy"' in (tmp_path / "a" / "report.html").read_text()

    def work() -> int:
        signal_at(StageTrainer, "_gradients", 7)  # two steps after the best
        return run_train(tiny_recipe, tmp_path / "b", *chosen)

    assert in_child(work) == -signal.SIGKILL
    assert run_train(tiny_recipe, tmp_path / "b", *chosen) == 0
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    assert tensors(tmp_path / "b" / "final") == tensors(tmp_path / "a" / "final")
    for change in ("run.best_by=loss", "eval.max_new_tokens=4"):  # it would choose otherwise
        assert run_train(tiny_recipe, tmp_path / "b", *chosen, change) == 5
    assert run_train(tiny_recipe, tmp_path / "b", *chosen, "eval.blank=true") == 0


@pytest.fixture(scope="module")
def straight(tiny_recipe: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("straight") / "run"
    more = ("run.eval_every=3", f"run.best_by={AUC}", "eval.ablate=[shuffle,noise]", "eval.blank=true")
    assert run_train(tiny_recipe, directory, *options(data_dir, *more)) == 0
    return directory


def test_the_figure_is_that_of_the_saved_checkpoint(straight: Path, data_dir: Path) -> None:
    rows = [row for row in metrics(straight) if AUC in row]
    assert [row["step"] for row in rows] == [3, 6]
    bundle = load(straight / "checkpoints" / "step-5", "cpu")
    questions = pope.read_questions(str(data_dir / "pope.jsonl"))
    _, found = pope.evaluate(bundle, questions, data_dir / "images", max_new_tokens=3, progress=False)
    assert float.fromhex(rows[0][AUC]) == found["auc"]


def test_the_figure_is_of_the_weights_as_they_are(tiny_recipe: Path, data_dir: Path) -> None:
    questions, seen = pope.read_questions(str(data_dir / "pope.jsonl")), set()
    for scale in (1.0, -1.0, 3.0):
        bundle = make_bundle(tiny_recipe, *options(data_dir))
        with torch.no_grad():
            for parameter in bundle.model.projector.parameters():
                parameter.mul_(30 * scale)
        recipe = bundle.recipe
        of = benchmarks(recipe.eval, recipe.data.images)[0]
        found = EvalFigure(AUC, of, bundle, recipe.eval, bundle.stage)(lambda: False)
        _, metrics = pope.evaluate(bundle, questions, data_dir / "images", max_new_tokens=3, progress=False)
        assert found == metrics["auc"]
        seen.add(found)
    assert len(seen) > 1


def test_sigterm_while_the_figure_is_found_is_made_up_for(
    straight: Path, tiny_recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    more = ("run.eval_every=3", f"run.best_by={AUC}", "eval.ablate=[shuffle,noise]", "eval.blank=true")

    def work() -> int:
        signal_at(figure, "Watched", 1, signal.SIGTERM)
        return run_train(tiny_recipe, tmp_path / "run", *options(data_dir, *more))

    assert in_child(work) == 143
    assert not any(AUC in row for row in metrics(tmp_path / "run"))
    assert run_train(tiny_recipe, tmp_path / "run", *options(data_dir, *more)) == 0
    assert metrics(tmp_path / "run") == metrics(straight)
    assert tensors(tmp_path / "run" / "final") == tensors(straight / "final")


def test_questions_are_asked_without_their_images_and_reported_beside_before_and_after(
    straight: Path, data_dir: Path
) -> None:
    kept = json.loads((straight / "evaluation.json").read_text())
    assert set(kept) == {"before", "after", "blank", "shuffle", "noise"}
    bundle = load(straight / "final", "cpu")
    questions = pope.read_questions(str(data_dir / "pope.jsonl"))
    for ablation in ("blank", "shuffle", "noise"):
        images = data_dir / "images"
        _, found = pope.evaluate(bundle, questions, images, ablate=ablation, max_new_tokens=3, progress=False)
        assert kept[ablation][0]["accuracy"] == found["accuracy"]
        assert kept[ablation][0]["auc"] == pytest.approx(found["auc"], abs=0.05)
        assert (straight / "answers" / f"pope-{ablation}.jsonl").is_file()
    report = (straight / "report.html").read_text()
    assert "<th>Blanked</th><th>Exchanged</th><th>Noise</th>" in report
    for label in ("image blanked", "another image", "noise for image"):
        assert f"pope, {label}, %" in report


def test_exchanging_the_only_image_is_refused_before_training(
    tiny_recipe: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.jsonl").write_text((data_dir / "pope.jsonl").read_text().splitlines()[0] + "\n")
    more = (f"eval.questions={tmp_path / 'one.jsonl'}", "eval.ablate=[shuffle]")
    assert run_train(tiny_recipe, tmp_path / "run", *more) == 2
    assert "error[C106] eval.ablate has shuffle, but" in capsys.readouterr().err


def test_the_stage_of_the_model_is_its_own_again_after_it_was_asked(
    tiny_recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_recipe, "pretrain", tmp_path / "run", *options(data_dir))
    recipe = trainer.bundle.recipe
    found = EvalFigure(
        NAME, benchmarks(recipe.eval, recipe.data.images)[0], trainer.bundle, recipe.eval, recipe.stages["instruct"]
    )
    assert trainer.bundle.stage.template == "plain"
    asked, original = set[str](), Bundle.turn_encoder

    def turn_encoder(self: Bundle) -> TurnEncoder:
        asked.add(self.stage.template)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bundle, "turn_encoder", turn_encoder)
        assert found(lambda: False) is not None
    assert asked == {"chatml"}
    assert trainer.bundle.stage.template == "plain"
    assert found(lambda: True) is None


def test_two_processes_know_the_figure_that_the_first_finds(
    straight: Path, tiny_recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    more = ("run.eval_every=3", f"run.best_by={AUC}", "run.timeout_s=50")

    def work(rank: int) -> int:
        return run_train(tiny_recipe, tmp_path / "run", *options(data_dir, *more))

    assert in_processes(work, tmp_path) == [0, 0]
    ours, theirs = ([(r["step"], r[AUC]) for r in metrics(d) if AUC in r] for d in (tmp_path / "run", straight))
    assert ours == theirs
