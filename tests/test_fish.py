"""FISH masks: which weights they choose, what training them means, and how little is kept."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import in_child, outcome, run_train, signal_at
from safetensors.torch import load_file
from tiny_models import logits, make, our_inputs, our_vlm, randomise
from torch import Tensor, nn

from vlmpeft import loop, tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.parts import parts_of
from vlmpeft.tune import Tuned
from vlmpeft.tuners import FishMask
from vlmpeft.tuners.fish import Mask

SHARE = 0.01


def losses(model: Any, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """Of two samples: the inputs, and the same with other answers."""
    for shift in (0, 1):
        labels = inputs["labels"]
        yield model(**(inputs | {"labels": torch.where(labels == -100, labels, labels + shift)})).loss


def mask_of(model: nn.Module) -> Mask:
    return next(m for m in model.modules() if isinstance(m, Mask))


def calibrated(model: Any, inputs: dict[str, Tensor], share: float = SHARE) -> Tuned:
    tuner = FishMask(share)
    tuned = tune(model, [tuner])
    tuner.calibrate(model, tuned.parts, losses(model, inputs))
    return tuned


KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])


@KINDS
def test_it_trains_the_entries_with_the_largest_mean_squared_gradient(kind: str, language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    twin, _ = make(kind, language_dir)
    twin.requires_grad_(False)
    weights = [p.requires_grad_(True) for block in parts_of(twin).blocks for p in block.parameters()]
    fisher = [torch.zeros_like(p) for p in weights]
    for loss in losses(twin, inputs):
        for total, gradient in zip(fisher, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.square() / 2
    flat = torch.cat([f.flatten() for f in fisher])
    count = round(SHARE * len(flat))
    expected = set(flat.topk(count).indices.tolist())
    tuned = calibrated(model, inputs)
    mask = mask_of(model)
    assert sum(p.numel() for p in tuned.trainable().values()) == count == len(mask.indices)
    assert len(expected - set(mask.indices.tolist())) <= 1  # the last two may be equal
    everything = torch.cat([p.detach().flatten() for p in weights])
    assert mask.values.equal(everything[mask.indices])
    assert mask.indices.equal(mask.indices.sort().values)
    assert all(p.grad is None for p in model.parameters())
    assert [p for p in model.parameters() if p.requires_grad] == [mask.values]


@KINDS
def test_steps_are_those_of_full_tuning_with_all_other_gradients_zeroed(kind: str, language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    tuned = calibrated(model, inputs)
    twin, _ = make(kind, language_dir)
    twin.requires_grad_(False)
    weights = [p.requires_grad_(True) for block in parts_of(twin).blocks for p in block.parameters()]
    keep = torch.zeros(sum(p.numel() for p in weights))
    keep[mask_of(model).indices] = 1
    keeps = [k.view_as(p) for k, p in zip(keep.split([p.numel() for p in weights]), weights, strict=True)]
    ours = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(**inputs).loss.backward()
        twin(**inputs).loss.backward()
        for parameter, kept in zip(weights, keeps, strict=True):
            parameter.grad.mul_(kept)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    states = [value for state in ours.state.values() for value in state.values() if value.ndim]
    assert {len(value) for value in states} == {len(mask_of(model).values)}
    torch.testing.assert_close(logits(model, inputs), logits(twin, inputs), rtol=1e-5, atol=1e-5)
    tuned.merge_and_unload()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-5, atol=1e-5)


@KINDS
def test_a_file_holds_indices_and_values_alone_and_needs_no_data_to_load(
    kind: str, language_dir: Path, tmp_path: Path
) -> None:
    model, inputs = make(kind, language_dir)
    tuned = calibrated(model, inputs)
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    tensors = load_file(tmp_path / "trained.safetensors")
    count = len(mask_of(model).values)
    assert {name.rsplit(".", 1)[-1]: tuple(t.shape) for name, t in tensors.items()} == {
        "values": (count,), "indices": (count,),
    }  # fmt: skip
    again, _ = make(kind, language_dir)
    found = tune(again, [FishMask(SHARE)])
    found.load(tmp_path)
    assert FishMask(SHARE).is_calibrated(again, found.parts)
    assert logits(again, inputs).equal(logits(model, inputs))


def test_on_a_bf16_model_it_trains_fp32_values(language_dir: Path) -> None:
    model, inputs = our_vlm(language_dir, torch.bfloat16), our_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    before = logits(model, inputs)
    tuned = calibrated(model, inputs)
    assert logits(model, inputs).equal(before)
    model(**inputs).loss.backward()
    assert [p.grad.dtype for p in tuned.trainable().values()] == [torch.float32]


def test_training_before_the_calibration_is_refused(language_dir: Path) -> None:
    model, inputs = make("ours", language_dir)
    before = logits(model, inputs)
    tuned = tune(model, [FishMask(SHARE)])
    assert logits(model, inputs).equal(before)
    with pytest.raises(ModelError, match=r"M564.*not chosen yet"):
        model.train()(**inputs)
    with pytest.raises(ModelError, match=r"M556.*not chosen yet"):
        tuned.merge()
    with pytest.raises(ModelError, match=r"M565"):
        FishMask(SHARE).calibrate(model, tuned.parts, [])
    with pytest.raises(ConfigError, match=r"fish.share"):
        FishMask(0.0)


def test_a_run_calibrates_once_and_resumes_bit_for_bit(tiny_recipe: Path, tmp_path: Path) -> None:
    """The mask is chosen by data of the run, and a resumed run takes it from its checkpoint."""
    fish = ("stages.instruct.tuners.lora=null", "stages.instruct.tuners.fish={kind: fish, samples: 3, share: 0.05}")
    assert run_train(tiny_recipe, tmp_path / "straight", *fish) == 0

    def work() -> int:
        signal_at(loop.StageTrainer, "_gradients", 10)  # in stage 2, between two saves
        return run_train(tiny_recipe, tmp_path / "killed", *fish)

    assert in_child(work) == -signal.SIGKILL
    assert run_train(tiny_recipe, tmp_path / "killed", *fish) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")
    saved = load_file(tmp_path / "straight" / "final" / "trained.safetensors")
    assert {name.removeprefix("language.fish_mask.") for name in saved} == {"indices", "values"}
    assert saved["language.fish_mask.indices"].min() >= 0
