"""Every way of tuning through the life that all of them promise; what is a method's own is in its own file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft_twins import assert_checkpointing_changes_nothing, assert_lives, assert_stock_peft_agrees, tune_calibrated
from quant_models import dense_twin, quantised_vlm
from tiny_models import changed, logits, our_inputs, our_vlm, randomise, state_of
from tuner_table import ELSEWHERE, EVERY, IN_PLACE, START, TABLE, UNMERGEABLE, VIRTUAL, tuned_model

from vlmpeft import fs, tune
from vlmpeft.errors import ModelError
from vlmpeft.optim import adamw, parameter_groups, set_lr
from vlmpeft.resume import OPTIMIZER, STEPS, load_optimizer, load_steps, optimizer_state
from vlmpeft.steps import Steps
from vlmpeft.tune import Tuned
from vlmpeft.tuners import TUNERS, LoRA
from vlmpeft.tuners.base import peft_form


def test_no_method_is_left_out() -> None:
    ours = {kind for kind in TUNERS if TUNERS.get(kind).__module__.startswith("vlmpeft.")}
    assert {tuner.kind for tuner in TABLE.values()} | ELSEWHERE == ours


@EVERY
def test_it_starts_as_the_base_merges_and_comes_out_bit_for_bit(name: str, language_dir: Path) -> None:
    merges, removes = name not in UNMERGEABLE, name not in IN_PLACE
    assert_lives(TABLE[name], language_dir, START.get(name, 0.0), merges, removes)


@EVERY
def test_checkpointing_changes_no_gradient(name: str, language_dir: Path) -> None:
    assert_checkpointing_changes_nothing(TABLE[name], language_dir)


@pytest.mark.parametrize("name", [n for n in TABLE if peft_form(TABLE[n]) and n not in VIRTUAL])
def test_stock_peft_loads_what_we_save(name: str, language_dir: Path, tmp_path: Path) -> None:
    assert_stock_peft_agrees(TABLE[name], language_dir, tmp_path)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_and_changes_what_is_declared(
    name: str, dtype: torch.dtype, language_dir: Path
) -> None:
    model, given = our_vlm(language_dir, dtype), our_inputs()
    given["pixel_values"] = given["pixel_values"].to(dtype)
    tuned = tune_calibrated(model, TABLE[name], given)
    trainable = tuned.trainable()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert logits(model, given).dtype == dtype
    before = state_of(model)
    optimizer = torch.optim.Adam(trainable.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert changed(before, model) == {key.replace(".base_layer.", ".") for key in trainable}


@EVERY
def test_stopped_saved_and_taken_up_again_it_ends_bit_for_bit_the_same(
    name: str, language_dir: Path, tmp_path: Path
) -> None:
    """With what the loop saves and restores; the loop itself, killed and resumed, is in tests/test_resume.py."""
    ends = []
    for stops in ((0, 4), (0, 2, 4)):
        for first, last in itertools.pairwise(stops):
            tuned = tune_calibrated(our_vlm(language_dir), TABLE[name], our_inputs())
            optimizer = adamw(parameter_groups(tuned, 1e-2, 0.1), (0.9, 0.999), 1e-8)
            set_lr(optimizer, 1.0)
            steps = Steps(tuned, 5, l2_sp=0.01)
            if first:
                tuned.load(tmp_path)
                load_optimizer(optimizer, tmp_path)
                load_steps(steps, tmp_path)
            train(tuned, optimizer, steps, range(first, last))
            tuned.save(tmp_path)
            fs.write_tensors(tmp_path / OPTIMIZER, optimizer_state(optimizer))
            fs.write_tensors(tmp_path / STEPS, steps.tensors())
        ends.append(state_of(tuned.model))
    assert all(value.equal(ends[1][key]) for key, value in ends[0].items())


def train(tuned: Tuned, optimizer: torch.optim.Optimizer, steps: Steps, numbers: range) -> None:
    """Train as the loop does."""
    for step in numbers:
        steps.before(step)
        given = our_inputs()
        given["labels"] = given["labels"].roll(step, 1)
        tuned.model(**given).loss.backward()
        steps.add_gradients()
        optimizer.step()
        steps.after(step)
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["ours", "hf"])
@EVERY
def test_saved_and_read_it_is_the_same(name: str, kind: str, language_dir: Path, tmp_path: Path) -> None:
    first, given, tuned = tuned_model(name, kind, language_dir)
    assert tuned.save(tmp_path) == tuned.tuned_names()
    second, _, again = tuned_model(name, kind, language_dir)
    randomise(again.trainable(), seed=7)
    assert not logits(second, given).equal(logits(first, given))
    again.load(tmp_path)
    assert logits(second, given).equal(logits(first, given))


WHOLE = {"layers", "unfreeze", "fish"}  # they train the very weights that are quantised


ON_QUANTISED = {**TABLE, "lora loftq": LoRA(4, init="loftq")}


@pytest.mark.parametrize("name", ON_QUANTISED)
def test_on_a_quantised_base_it_acts_as_on_the_weights_that_stand_for_it(name: str, wide_dir: Path) -> None:
    model, given, tuner = quantised_vlm(wide_dir, keep=name == "lora loftq"), our_inputs(), ON_QUANTISED[name]
    if name in WHOLE:
        with pytest.raises(ModelError, match=r"M551.*quantised.*lora"):
            tune(model, [tuner])
        return
    tuned = tune(model, [tuner])
    randomise(tuned.trainable())
    twin = dense_twin(model)
    torch.testing.assert_close(logits(model, given), logits(twin, given), rtol=1e-4, atol=1e-4)
    for one in (model, twin):
        one(**given).loss.backward()
    dense = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert dense.keys() == tuned.trainable().keys()
    for key, parameter in tuned.trainable().items():
        assert dense[key].abs().max() > 0, key
        assert (parameter.grad - dense[key]).abs().max() <= 1e-4 * max(1.0, float(dense[key].abs().max())), key
