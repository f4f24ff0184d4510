"""Comparisons: which runs there are, how they go on after a kill, and that an arm's numbers are its own."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import FAST, in_child, refusal

from vlmpeft import compare, fs
from vlmpeft.compare_config import read_comparison
from vlmpeft.compare_loop import Results, run_all, schedule
from vlmpeft.compare_plan import Plan, Task
from vlmpeft.compare_report import write_all
from vlmpeft.config import load_comparison, load_recipe, recipe_names
from vlmpeft.errors import ModelError, run_command

YAML = """
base: "{recipe}"
title: three ways
stages: {{instruct: {{tuners: {{lora: null}}, optim: {{steps: 2}}}}}}
compare:
  dir: "{directory}"
  start: "{start}"
  reference: projector
  seeds: [0, 1]
  sweep: {{steps: 1, images: 4}}
  lmar: true
  sets: {{flat: {{questions: "{data}/pope.jsonl", split: 2}}}}
  arms:
    frozen: {{train: false}}
    projector: {{}}
    lora: {{tuners: {{lora: {{kind: lora, r: 2}}}}, lr: [1e-3, 1e-2]}}
    norm: {{tuners: {{norm: {{kind: norm}}}}, lr: [2e-3]}}
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests keep the stages before the compared one, so that they run once."""
    return tmp_path_factory.mktemp("start")


@pytest.fixture
def recipe(tmp_path: Path, tiny_recipe: Path, data_dir: Path, start: Path) -> Path:
    path = tmp_path / "three.yaml"
    path.write_text(YAML.format(recipe=tiny_recipe, data=data_dir, directory=tmp_path / "out", start=start))
    return path


def plan_of(recipe: Path, *overrides: str) -> Plan:
    section, shared = load_comparison(str(recipe), [*FAST, *overrides])
    comparison = read_comparison(section)
    rows = [json.loads(line) for line in Path(comparison.sets["flat"].questions).read_text().splitlines()]
    return Plan(comparison, shared, {"flat": rows})


def fake(plan: Plan, margin: Callable[[Task], float] = lambda _: 1.0) -> Callable[[Task], dict[str, Any]]:
    """Work that takes no time; every question gets the margin of its run, towards its label."""

    def work(task: Task) -> dict[str, Any]:
        asked = plan.asked(task)
        signs = [1 if row["label"] == "yes" else -1 for row in asked]
        return {
            "seed": task.seed, "arm": task.arm, "lr": task.lr, "questions": [str(row["question_id"]) for row in asked],
            "margins": [margin(task) * sign for sign in signs], "trainable_language": 10, "trainable_projector": 5,
            "adapter_bytes": 2048, "seconds_per_step": 0.5, "peak_bytes": 3 * 2**20,
        }  # fmt: skip

    return work


def done(directory: Path) -> dict[str, Any]:
    """Results by file, without what the clock and the allocator decide."""
    measured = ("seconds_per_step", "peak_bytes")
    rows = {path.name: json.loads(path.read_text()) for path in sorted((directory / "results").glob("*.json"))}
    return {name: {k: v for k, v in row.items() if k not in measured} for name, row in rows.items()}


def test_a_sweep_comes_before_its_arm_and_one_seed_before_the_next(recipe: Path) -> None:
    names = [task.name for task in schedule(plan_of(recipe))]
    assert names == [
        "flat: frozen, seed 0", "flat: projector, seed 0", "sweep flat: lora, lr 0.001, seed 0",
        "sweep flat: lora, lr 0.01, seed 0", "flat: lora, seed 0", "flat: norm, seed 0", "flat: frozen, seed 1",
        "flat: projector, seed 1", "flat: lora, seed 1", "flat: norm, seed 1",
    ]  # fmt: skip


def test_no_final_run_is_asked_what_its_rate_was_chosen_on(recipe: Path) -> None:
    plan = plan_of(recipe)
    sweep, *finals = (
        {row["image"] for row in plan.asked(Task("flat", "lora", seed, None, seed < 0))} for seed in (-1, 0, 1)
    )
    assert len(sweep) == 4
    assert not sweep & (finals[0] | finals[1])
    assert not finals[0] & finals[1]  # split: a share of the images each
    assert len(sweep | finals[0] | finals[1]) == len({row["image"] for row in plan.rows["flat"]})


def test_an_arm_trains_its_tuners_beside_those_of_the_stage(recipe: Path) -> None:
    plan = plan_of(recipe)
    swept = plan.recipe(Task("flat", "lora", 1, 1e-2, True))
    (stage,) = swept.stages.values()
    assert {name: (t.kind, t.lr) for name, t in stage.tuners.items()} == {
        "projector": ("full", 1e-3), "lora": ("lora", 1e-2)
    }  # fmt: skip
    assert (stage.optim.steps, swept.run.seed) == (1, 1)
    assert [s.optim.steps for s in plan.recipe(Task("flat", "norm", 0, None, False)).stages.values()] == [2]
    start = plan.start(Task("flat", "lora", 1, 1e-2, True))
    assert start is not None
    assert (list(start.stages), start.run.seed) == (["pretrain"], 1)


def test_the_rate_that_answers_most_surely_right_is_taken(recipe: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe)
    results = Results(plan, tmp_path)
    assert run_all(plan, results, fake(plan, lambda task: 2.0 if task.lr == 1e-3 else 0.5), print) == 0
    chosen = {(row["arm"], row["lr"]) for name, row in done(tmp_path).items() if "sweep" not in name}
    assert chosen == {("frozen", None), ("projector", None), ("lora", 1e-3), ("norm", 2e-3)}


def test_what_is_done_is_not_done_again_unless_it_has_changed(recipe: Path, tmp_path: Path) -> None:
    made: list[str] = []

    def count(plan: Plan) -> int:
        work, before = fake(plan), len(made)

        def counted(task: Task) -> dict[str, Any]:
            made.append(task.name)
            return work(task)

        assert run_all(plan, Results(plan, tmp_path), counted, print) == 0
        return len(made) - before

    assert count(plan_of(recipe, "compare.only=[lora,norm]")) == 6
    assert count(plan_of(recipe)) == 4
    assert count(plan_of(recipe)) == 0
    assert count(plan_of(recipe, "compare.arms.lora.tuners.lora.r=4")) == 4  # two of the sweep, two seeds
    assert count(plan_of(recipe, "stages.pretrain.optim.epochs=1")) == 10  # all start from there


def test_comparisons_that_share_their_results_make_no_run_twice(recipe: Path, tmp_path: Path) -> None:
    shared = f"compare.results={tmp_path / 'shared'}"
    one = plan_of(recipe, shared, "compare.arms.norm=null")
    assert run_all(one, Results(one, tmp_path / "one"), fake(one), print) == 0
    other = plan_of(recipe, shared)
    made: list[Task] = []
    work = fake(other)

    def counted(task: Task) -> dict[str, Any]:
        made.append(task)
        return work(task)

    assert run_all(other, Results(other, tmp_path / "other"), counted, print) == 0
    assert {task.arm for task in made} == {"norm"}
    assert not (tmp_path / "other" / "results").exists()


def test_reading_lmar_as_well_changes_final_runs_and_no_sweep(recipe: Path) -> None:
    with_lmar, without = plan_of(recipe), plan_of(recipe, "compare.lmar=false")
    sweep, final = Task("flat", "lora", 0, 1e-3, True), Task("flat", "lora", 0, 1e-3, False)
    assert with_lmar.digest(sweep) == without.digest(sweep)
    assert with_lmar.digest(final) != without.digest(final)


def test_a_failed_arm_is_reported_and_does_not_sink_the_others(recipe: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe)
    results, work = Results(plan, tmp_path), fake(plan)

    def failing(task: Task) -> dict[str, Any]:
        if task.arm == "lora":
            raise ModelError("M551", "nothing to train.")
        return work(task)

    said: list[str] = []
    assert run_all(plan, results, failing, said.append) == 0
    assert set(results.errors) == {
        "flat-lora-seed0-lr0.001-sweep", "flat-lora-seed0-lr0.01-sweep", "flat-lora-seed0", "flat-lora-seed1"
    }  # fmt: skip
    assert all("[M551] nothing to train." in line for line in said)
    lines = write_all(results, tmp_path, "t")["flat"]
    assert [line.arm for line in lines] == ["frozen", "projector", "norm"]
    assert "[M551] nothing to train." in (tmp_path / "table.md").read_text()
    assert run_all(plan, Results(plan, tmp_path), work, print) == 0  # the next command makes it again
    assert len([name for name in done(tmp_path) if "-lora-" in name]) == 4


def test_no_run_starts_once_the_hours_are_used_up(recipe: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe, "compare.hours=1e-9")
    assert run_all(plan, Results(plan, tmp_path), fake(plan), print) == 10
    assert done(tmp_path) == {}


def test_the_table_says_what_was_measured(recipe: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe, "compare.only=[projector,norm]")
    right = {("projector", 0): 1.0, ("projector", 1): -1.0, ("norm", 0): 1.0, ("norm", 1): 1.0}
    results = Results(plan, tmp_path)
    run_all(plan, results, fake(plan, lambda task: right[task.arm, task.seed]), print)
    write_all(results, tmp_path, "three ways")
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in row] for row in rows[2:]] == [
        ["projector", "10", "5", "", "50.0", "70.7", "", "2", "0.50", "3.0 MiB", "2.0 KiB"],
        ["norm", "10", "5", "0.002", "100.0", "0.0", rows[3][6].strip(), "2", "0.50", "3.0 MiB", "2.0 KiB"],
    ]
    found = json.loads((tmp_path / "table.json").read_text())["sets"]["flat"][1]
    assert (found["arm"], found["questions"], found["paired"]["difference"]) == ("norm", 8, 0.5)
    assert re.fullmatch(r"\+50\.0 \(\+\d+\.\d to \+\d+\.\d\)", rows[3][6].strip())
    assert (tmp_path / "flat-accuracy.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "<td>100.0</td>" in page
    assert "<td></td>" not in page  # a dash where nothing was measured
    assert 'alt="Accuracy of each arm on flat, against the parameters it trains in the language model"' in page


def run_compare(recipe: Path, directory: Path, *overrides: str) -> int:
    return run_command(compare.main, [f"recipe={recipe}", f"compare.dir={directory}", *FAST[:1], *overrides])


def test_arms_of_one_process_give_the_numbers_they_give_alone(recipe: Path, tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    assert run_compare(recipe, together, "compare.seeds=[0]", "compare.arms.lora.lr=[1e-2]") == 0
    found = done(together)
    assert len(found) == 4
    options = ("compare.seeds=[0]", "compare.arms.lora.lr=[1e-2]", "compare.only=[lora]")
    assert run_compare(recipe, alone, *options) == 0
    ((name, result),) = done(alone).items()
    assert result == found[name]
    assert len(result["lmar"]) == len(result["visual_mass"]) == 2
    margins = {row["arm"]: row["margins"] for row in found.values()}
    assert margins["lora"] != margins["projector"] != margins["frozen"]
    sizes = {row["arm"]: (row["trainable_language"], row["trainable_projector"]) for row in found.values()}
    assert sizes["frozen"] == (0, 0)
    assert sizes["norm"][0] == 5 * 32  # two norms a block and the last one
    assert sizes["projector"][0] == 0 < sizes["projector"][1] == sizes["lora"][1]


def test_a_killed_comparison_goes_on_and_ends_with_the_same_results(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    options = ("compare.only=[frozen,norm]", "compare.seeds=[0]")
    assert run_compare(recipe, straight, *options) == 0
    original = fs.write_json

    def dying(path: Path, value: Any) -> None:
        original(path, value)
        if path.parent.name == "results":
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "write_json", dying)
        assert in_child(lambda: run_compare(recipe, killed, *options)) == -signal.SIGKILL
    assert len(done(killed)) == 1
    assert run_compare(recipe, killed, *options) == 0
    assert done(killed) == done(straight)
    assert (killed / "table.md").is_file()


def test_shipped_comparisons_are_no_recipes_of_a_run() -> None:
    names = recipe_names(comparisons=True)
    assert names == ["compare_tuners", "study_mores"]
    assert not set(names) & set(recipe_names())
    for name in names:
        section, shared = load_comparison(name)
        comparison = read_comparison(section)
        rows = [{"question_id": i, "image": f"{i // 6}.png", "label": "yes"} for i in range(6 * 384)]
        plan = Plan(comparison, shared, dict.fromkeys(comparison.sets, rows))
        assert sum(len(plan.asked(Task("scenes", "lora", seed, None, False))) for seed in comparison.seeds) == 2004
        for task in schedule(plan):  # every arm's section is valid
            (stage,) = plan.recipe(task).stages.values()
            assert "lora" not in stage.tuners or task.arm == "lora"
        error = refusal(lambda name=name: load_recipe(name))  # type: ignore[misc]
        assert error is not None
        assert f"vlmpeft.compare recipe={name}" in error.fix


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.only=[lroa]", "did you mean 'lora'"),
        ("compare.sweep.step=1", "did you mean 'steps'"),
        ("compare.arms.lora.tuners.lora.kind=lroa", "did you mean 'lora'"),
        ("compare.sweep.images=12", "no image is left"),
        ("compare.sets.flat.questions=gone.jsonl", "no such file"),
        ("compare.hours=0", "compare.hours"),
    ],
)
def test_a_wrong_key_is_named_before_anything_runs(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert run_compare(recipe, tmp_path / "out", override) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "results").exists()
