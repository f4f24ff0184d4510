"""Gradual unfreezing: what has not begun to train does not change, in our loop and in anyone's."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import in_child, make_trainer, outcome, run_train, signal_at
from tiny_models import changed, hf_llava, logits, make, our_vlm, randomise, state_of

from vlmpeft import loop, tune
from vlmpeft.errors import ConfigError, EnvironmentFault
from vlmpeft.parts import parts_of
from vlmpeft.steps import Steps
from vlmpeft.stopping import StopSignal
from vlmpeft.tuners import GradualUnfreezing, LayerTuning

UNFREEZE = "stages.instruct.tuners.unfreeze={kind: unfreeze, groups: [1, 1], steps: [0, 2], lr: 1e-3}"
RECIPE = ("stages.instruct.tuners.lora=null", "stages.instruct.tuners.projector=null", UNFREEZE)


KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])


@KINDS
def test_steps_are_those_of_an_optimizer_that_gets_each_block_when_its_step_comes(
    kind: str, language_dir: Path
) -> None:
    ours, inputs = make(kind, language_dir)
    theirs, _ = make(kind, language_dir)
    tuner = GradualUnfreezing((1, 1), (0, 2))
    tuned = tune(ours, [tuner])
    mine = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2, weight_decay=0.1)
    theirs.requires_grad_(False)
    below, top = parts_of(theirs).blocks
    other = torch.optim.AdamW(top.requires_grad_(True).parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        if step == 2:
            other.add_param_group({"params": list(below.requires_grad_(True).parameters())})
        tuner.before_step(tuned.parts, step)
        for model, optimizer in ((ours, mine), (theirs, other)):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    tuned.merge_and_unload()
    assert not changed(state_of(theirs), ours)


@pytest.mark.parametrize("l2_sp", [0.0, 0.1])
def test_in_the_loop_a_group_does_not_change_before_its_step(l2_sp: float, tiny_recipe: Path, tmp_path: Path) -> None:
    more = ("stages.instruct.optim.steps=4", f"stages.instruct.optim.l2_sp={l2_sp}")
    decay = "stages.instruct.optim.weight_decay=0.1"
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path, *RECIPE, *more, decay, "stages.instruct.optim.warmup=0")
    parameters = trainer.bundle.tuned.trainable()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    moved: list[set[str]] = []

    def look(*_: Any) -> None:
        moved.append({name.split(".layers.")[1][0] for name, p in parameters.items() if not p.equal(start[name])})

    trainer.optimizer.register_step_post_hook(look)
    trainer.train(StopSignal())
    assert moved == [{"1"}, {"1"}, {"0", "1"}, {"0", "1"}]


def test_a_run_resumes_bit_for_bit(tiny_recipe: Path, tmp_path: Path) -> None:
    assert run_train(tiny_recipe, tmp_path / "straight", *RECIPE) == 0

    def work() -> int:
        signal_at(loop.StageTrainer, "_step", 8)  # in stage 2, before the second group begins
        return run_train(tiny_recipe, tmp_path / "killed", *RECIPE)

    assert in_child(work) == -signal.SIGKILL
    assert run_train(tiny_recipe, tmp_path / "killed", *RECIPE) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")


@KINDS
def test_it_trains_and_saves_what_layer_tuning_of_the_same_blocks_does(
    kind: str, language_dir: Path, tmp_path: Path
) -> None:
    model, inputs = make(kind, language_dir)
    state, before = state_of(model), logits(model, inputs)
    tuned = tune(model, [GradualUnfreezing((2,), (0,))])
    assert logits(model, inputs).equal(before)
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    again, _ = make(kind, language_dir)
    layers = tune(again, [LayerTuning("last:2")])
    assert layers.trainable().keys() == tuned.trainable().keys()
    layers.load(tmp_path)
    assert logits(again, inputs).equal(logits(model, inputs))
    tuned.remove()
    assert not changed(state, model)


def test_several_processes_are_refused(language_dir: Path) -> None:
    tuned = tune(our_vlm(language_dir), [GradualUnfreezing((1,), (0,))])
    with pytest.raises(EnvironmentFault, match=r"E434.*'unfreeze'.*one process"):
        Steps(tuned, 10, processes=2)


@pytest.mark.parametrize(
    ("groups", "steps"),
    [((), ()), ((1, 0), (0, 5)), ((1, 1), (0,)), ((1, 1), (0, 0)), ((1, 1), (5, 0)), ((1,), (3,))],
)
def test_schedules_that_make_no_sense_are_refused(groups: tuple[int, ...], steps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"C102.*unfreeze\.(groups|steps)"):
        GradualUnfreezing(groups, steps)


def test_more_blocks_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"C102.*unfreeze.groups.*2 blocks in all"):
        tune(hf_llava(), [GradualUnfreezing((2, 1), (0, 1))])
