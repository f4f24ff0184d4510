"""One stage of training: what a step computes, what stops it, and which weights it leaves."""

from __future__ import annotations

import dataclasses
import json
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import in_child, make_bundle, make_trainer, metrics, run_train, signal_at, tensors

from vlmpeft import data, loop, run
from vlmpeft.errors import EnvironmentFault, NumericError
from vlmpeft.loop import StageTrainer, checkpoint_activations
from vlmpeft.stopping import Preempted, StopSignal

PLAIN = ("stages.instruct.tuners.lora.dropout=0", "stages.instruct.batch.group=none")


def gradients_of(trainer: StageTrainer, steps: int) -> list[dict[str, torch.Tensor]]:
    """The gradients of the first optimizer steps."""
    seen: list[dict[str, torch.Tensor]] = []
    trainer.total = steps
    trainable = trainer.bundle.tuned.trainable()

    def keep(*_: Any) -> None:
        seen.append({k: torch.zeros(()) if p.grad is None else p.grad.clone() for k, p in trainable.items()})

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train(StopSignal())
    return seen


def test_accumulated_micro_batches_equal_one_big_batch(tiny_recipe: Path, tmp_path: Path) -> None:
    """Samples of mixed length and supervised tokens, with and without images."""
    found = {}
    for micro in (8, 2, 3):
        # eps keeps AdamW's division from blowing rounding errors up
        more = (f"stages.instruct.batch.micro={micro}", "stages.instruct.batch.size=8", "stages.instruct.optim.eps=0.1")
        trainer = make_trainer(tiny_recipe, "instruct", tmp_path / str(micro), *PLAIN, *more)
        gradients = gradients_of(trainer, 2)
        weights = {k: p.detach().clone() for k, p in trainer.bundle.tuned.trainable().items()}
        found[micro] = (gradients, weights, metrics(tmp_path / str(micro)))
    whole, weights, rows = found[8]
    assert any(g.abs().max() > 1e-3 for g in whole[0].values())
    for micro in (2, 3):
        for a, b in zip(whole, found[micro][0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights, found[micro][1], rtol=0, atol=1e-6)
        for a_row, b_row in zip(rows, found[micro][2], strict=True):
            assert float.fromhex(a_row["loss"]) == pytest.approx(float.fromhex(b_row["loss"]), abs=1e-6)
            assert a_row["supervised_tokens"] == b_row["supervised_tokens"]


def test_loss_of_a_step_is_the_mean_over_its_supervised_tokens(tiny_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path, *PLAIN)
    [share] = trainer._shares(0, 1)
    total, count = 0.0, 0
    for index in [i for forward in share for i in forward]:
        [loaded] = data.load_batches(trainer.samples, [[index]], 0)
        with torch.no_grad():
            total += float(trainer.bundle.model(**loaded.batch.tensors(), num_items_in_batch=1).loss)
        count += loaded.batch.num_supervised
    gradients_of(trainer, 1)
    [row] = metrics(tmp_path)
    assert row["supervised_tokens"] == count
    assert float.fromhex(row["loss"]) == pytest.approx(total / count, abs=1e-5)


def test_step_changes_what_is_trainable_and_no_other_byte(tiny_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path, *PLAIN)
    before = {k: v.clone() for k, v in trainer.bundle.model.state_dict().items()}
    gradients_of(trainer, 3)  # the first step's learning rate is 0, and while B is 0 nothing reaches A
    changed = {k for k, v in trainer.bundle.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(trainer.bundle.tuned.trainable())


def test_clipping_scales_the_whole_gradient(tiny_recipe: Path, tmp_path: Path) -> None:
    whole = gradients_of(make_trainer(tiny_recipe, "instruct", tmp_path / "a", *PLAIN), 1)[0]
    clipped = gradients_of(
        make_trainer(tiny_recipe, "instruct", tmp_path / "b", *PLAIN, "stages.instruct.optim.clip=0.1"), 1
    )[0]
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    assert norm > 0.1
    assert float.fromhex(metrics(tmp_path / "b")[0]["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(clipped[name], gradient * (0.1 / norm), rtol=1e-4, atol=1e-7)


def test_new_adapters_start_alike_whatever_was_drawn_before(tiny_recipe: Path, tmp_path: Path) -> None:
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer = make_trainer(tiny_recipe, "instruct", tmp_path)
        starts.append({k: p.detach().clone() for k, p in trainer.bundle.tuned.trainable().items()})
    assert all(torch.equal(starts[0][k], v) for k, v in starts[1].items())


def test_text_only_batches_train_nothing_of_a_projector_stage(tiny_recipe: Path, tmp_path: Path) -> None:
    more = (
        "stages.pretrain.source=instruct",
        "stages.pretrain.template=chatml",
        "stages.pretrain.batch.group=modality",
    )
    trainer = make_trainer(tiny_recipe, "pretrain", tmp_path, *more)
    gradients = gradients_of(trainer, 4)  # one epoch: 12 samples with an image, 4 without
    moved = [any(g.abs().max() > 0 for g in step.values()) for step in gradients]
    assert sorted(moved) == [False, True, True, True]


def test_activation_checkpointing_leaves_gradients_alone_and_warns_of_nothing(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path)
    bundle = make_bundle(tiny_recipe)
    [loaded] = data.load_batches(trainer.samples, [[0, 5, 13]], 0)
    block, calls, found = bundle.parts.blocks[0], [0], []
    block.self_attn.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))  # type: ignore[operator, union-attr]
    for on in (False, True):
        calls[0] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint_activations(bundle.model.language, on)
        bundle.model.train()
        torch.manual_seed(3)
        bundle.model(**loaded.batch.tensors()).loss.backward()
        found.append({k: p.grad.clone() for k, p in bundle.tuned.trainable().items() if p.grad is not None})
        bundle.model.zero_grad(set_to_none=True)
        assert calls == [2 if on else 1]
    assert set(found[0]) == set(bundle.tuned.trainable())
    assert all(g.abs().max() > 0 for g in found[0].values())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def poison_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`-th batch of a training has a picture of NaN."""
    original = loop.load_batches

    def poisoned(*arguments: Any) -> Any:
        for i, loaded in enumerate(original(*arguments), start=1):
            pixels = loaded.batch.pixel_values
            bad = pixels is not None and i == number
            batch = dataclasses.replace(loaded.batch, pixel_values=pixels * float("nan")) if bad else loaded.batch
            yield dataclasses.replace(loaded, batch=batch)

    monkeypatch.setattr(loop, "load_batches", poisoned)


def test_nan_loss_stops_before_the_update_and_names_the_samples(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison_batch(monkeypatch, 6)  # the second of step 3
    trainer = make_trainer(tiny_recipe, "pretrain", tmp_path / "a", "run.save_every=1")
    states: list[dict[str, torch.Tensor]] = []
    keep = lambda *_: states.append({k: v.clone() for k, v in trainer.bundle.model.state_dict().items()})  # noqa: E731
    trainer.optimizer.register_step_post_hook(keep)
    with pytest.raises(NumericError) as caught:
        trainer.train(StopSignal())
    shares = trainer._shares(2, 3)[0]
    assert caught.value.code == "N301"
    assert "step 3" in caught.value.message
    assert all(trainer.data.train[i].uid in caught.value.message for share in shares for i in share)
    assert len(states) == 2
    assert all(torch.equal(v, states[-1][k]) for k, v in trainer.bundle.model.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir()) == ["step-1", "step-2"]

    assert run_train(tiny_recipe, tmp_path / "b", "run.save_every=1") == 7
    assert "vlmpeft: error[N301] stage pretrain step 3" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir()) == ["step-1", "step-2"]
    assert len(metrics(tmp_path / "b")) == 2


def test_gradient_that_is_not_finite_under_a_finite_loss_is_caught(tiny_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe, "pretrain", tmp_path)
    next(iter(trainer.bundle.tuned.trainable().values())).register_hook(lambda g: g * float("inf"))
    with pytest.raises(NumericError, match=r"gradient norm (inf|nan)"):
        trainer.train(StopSignal())


def test_out_of_memory_names_the_knobs(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny_recipe, "pretrain", tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore.")

    monkeypatch.setattr(trainer.bundle.model, "forward", full)
    with pytest.raises(EnvironmentFault, match=r"E401.*step 1.*20.00 MiB.*batch.micro"):
        trainer.train(StopSignal())


SCRIPT = {"pretrain": [5.0, 3.0, 3.5, 3.2, 3.1, 3.0], "instruct": [9.0, 8.0, 8.0, 8.5]}  # held-out losses by step


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def held_out_loss(self: StageTrainer, model: Any, stop: StopSignal) -> float:
        return SCRIPT[self.name][self.position.step - 1]

    monkeypatch.setattr(StageTrainer, "held_out_loss", held_out_loss)


STOPPING = ("data.held_out=0.25", "run.eval_every=1", "run.patience=2", "run.keep=50")


@pytest.mark.usefixtures("scripted")
def test_early_stopping_leaves_each_stage_with_its_best_weights(tiny_recipe: Path, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    assert run_train(tiny_recipe, directory, *STOPPING) == 0
    steps = {p.name: tensors(p) for p in (directory / "checkpoints").iterdir()}
    stages = json.loads((directory / "summary.json").read_text())["stages"]
    assert [(s["steps"], s["best_step"]) for s in stages] == [(4, 2), (4, 6)]
    assert set(steps) == {f"step-{n}" for n in (1, 2, 4, 5, 6, 8)}  # every best one, and the end of each stage

    def projector(name: str) -> bytes:
        return steps[name]["projector.safetensors"]

    assert projector("step-4") == projector("step-2") != projector("step-1")  # stage 2 starts from the best of stage 1
    assert tensors(directory / "final") == {k: v for k, v in steps["step-6"].items() if k != "optimizer.safetensors"}
    assert projector("step-8") == projector("step-6") != projector("step-5")

    def work() -> int:
        signal_at(run, "save_checkpoint", 1)
        return run_train(tiny_recipe, tmp_path / "b", *STOPPING)

    assert in_child(work) == -signal.SIGKILL  # stage 1 had just stopped early
    assert run_train(tiny_recipe, tmp_path / "b", *STOPPING) == 0
    assert metrics(tmp_path / "b") == metrics(directory)
    assert tensors(tmp_path / "b" / "final") == tensors(directory / "final")


def test_held_out_loss_is_the_mean_over_supervised_tokens(tiny_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path, "data.held_out=0.4")
    held = data.Samples(trainer.data.held_out, trainer.data.load)
    [whole] = data.load_batches(held, [list(range(len(held)))], 0)
    trainer.bundle.model.eval()
    with torch.no_grad():
        expected = float(trainer.bundle.model(**whole.batch.tensors()).loss)
    assert trainer.held_out_loss(trainer.bundle.model, StopSignal()) == pytest.approx(expected, abs=1e-5)


def test_without_eval_every_the_end_of_a_stage_is_evaluated(tiny_recipe: Path, tmp_path: Path) -> None:
    assert run_train(tiny_recipe, tmp_path, "data.held_out=0.25") == 0
    evaluated = [(r["stage"], r["step"]) for r in metrics(tmp_path) if "eval_loss" in r]
    assert evaluated == [("pretrain", 6), ("instruct", 4)]


def test_held_out_loss_that_is_not_finite_is_an_error(tiny_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path, "data.held_out=0.25")
    with torch.no_grad():
        next(trainer.bundle.model.projector.parameters()).fill_(float("nan"))
    with pytest.raises(NumericError, match="held-out loss nan"):
        trainer.held_out_loss(trainer.bundle.model, StopSignal())


def swallow(stop: StopSignal) -> bool:
    """A library that goes on whatever happens. Returns: whether it could."""
    with stop.at_once():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            return True
    return True


def test_stop_signal_is_a_flag_outside_and_an_exception_inside_at_once() -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received
        with pytest.raises(Preempted):
            stop.check()
        with pytest.raises(Preempted):
            stop.at_once().__enter__()
    with StopSignal() as stop, pytest.raises(Preempted):
        swallow(stop)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
