"""Recipe to bundle: devices, precision, seeds, the projector's fit, stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlmpeft
from vlmpeft.build import assemble, choose_device, choose_dtype, enter_stage, image_tokens
from vlmpeft.config import load_recipe
from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.projectors import MLPProjector

CHANGED = ["vision=timm:test_vit", "vision.weights=random", "projector=ldpv2", "projector.grid=5"]
CPU, FP32 = torch.device("cpu"), torch.float32


def test_auto_takes_the_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda", 1))
    assert choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["warp", "cuda:99", ""])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(EnvironmentFault, match=r"^\[E412\] device [^\n]+run.device=auto or cpu in a recipe\)\.$"):
        choose_device(name)


def test_a_device_that_torch_does_not_know_is_not_answered_with_all_it_does() -> None:
    with pytest.raises(EnvironmentFault, match=r"device 'gpu' cannot be used: torch knows no such device\. Fix: use"):
        choose_device("gpu")


BF16 = {"amx_bf16": torch.bfloat16, "avx512_bf16": torch.bfloat16, "avx2": FP32}


@pytest.mark.parametrize("capability", BF16)
def test_auto_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert choose_dtype("auto", CPU) == BF16[capability]
    assert choose_dtype("bf16", CPU) == torch.bfloat16
    assert choose_dtype("fp32", CPU) == FP32


def test_the_projector_depends_on_the_seed_alone(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (assemble(recipe, CPU, FP32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [bundle.model.projector.state_dict()["0.weight"] for bundle in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.fingerprints == second.fingerprints
    assert set(first.fingerprints) == {"vision", "language"}


def test_nothing_trains_unless_a_stage_says_so(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    bundle = assemble(recipe, CPU, FP32)
    assert not any(p.requires_grad for p in bundle.model.parameters())
    for name, kinds in (("pretrain", {"projector"}), ("instruct", {"projector", "language"})):
        enter_stage(bundle, recipe.stages[name])
        trains = {n.split(".")[0] for n, p in bundle.model.named_parameters() if p.requires_grad}
        assert trains == kinds
        assert bundle.stage == recipe.stages[name]


def test_build_enters_the_last_stage_in_the_asked_precision(tiny_recipe: Path) -> None:
    bundle = vlmpeft.build(load_recipe(str(tiny_recipe), ["run.precision=bf16"]))
    assert bundle.stage == bundle.recipe.stages["instruct"]
    frozen = {p.dtype for p in bundle.model.parameters() if not p.requires_grad}
    trained = {p.dtype for p in bundle.model.parameters() if p.requires_grad}
    assert (frozen, trained) == ({torch.bfloat16}, {FP32})
    assert bundle.generate(None, "What?", max_new_tokens=2) is not None


def test_image_tokens_are_counted_after_the_projector(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), CHANGED)
    bundle = assemble(recipe, CPU, FP32)
    assert bundle.image_tokens == image_tokens(bundle.model) == 25
    pixels = torch.zeros(1, 3, bundle.image_transform.size, bundle.image_transform.size)
    assert bundle.model.image_embeddings(pixels).shape == (1, 25, 32)
    assert bundle.turn_encoder().image_tokens == 25


def test_a_projector_that_cannot_take_the_grid_is_refused_before_training(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_tokens(self: MLPProjector, n: int) -> int:
        raise ModelError("M520", f"{n} tokens do not fit.")

    monkeypatch.setattr(MLPProjector, "num_tokens", num_tokens)
    with pytest.raises(ModelError, match=r"M520.*25 tokens"):
        assemble(load_recipe(str(tiny_recipe)), CPU, FP32)


def test_the_public_names_stay_functions_after_their_modules_are_imported() -> None:
    import vlmpeft.build
    import vlmpeft.tune

    assert callable(vlmpeft.build)
    assert callable(vlmpeft.tune)
    assert callable(vlmpeft.load)
    assert vlmpeft.Bundle.__module__ == "vlmpeft.build"
    assert all(hasattr(vlmpeft, name) for name in vlmpeft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlmpeft.nothing
