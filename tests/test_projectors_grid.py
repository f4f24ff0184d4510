"""The encoder's grid on its way to the projector: through build, dry run, save and load, and in errors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from projector_parity import NAMES, SMALL
from torch import Tensor, nn

import vlmpeft
from vlmpeft import checkpoint
from vlmpeft.build import assemble, dry_run
from vlmpeft.config import load_recipe
from vlmpeft.encoder import Encoder, Pixels
from vlmpeft.errors import ModelError
from vlmpeft.projectors import PROJECTORS, GridProjector

CPU, FP32 = torch.device("cpu"), torch.float32
CONVOLUTION = ["vision=timm:test_efficientnet", "vision.weights=random", "vision.image_size=96"]  # gives 3 x 3 tokens


class Strips(Encoder):
    """An encoder of upright patches: 60 x 60 pixels become 6 rows of 10."""

    def features(self, pixel_values: Tensor) -> Tensor:
        return self.backbone(pixel_values)


def strips(*args: Any, **kwargs: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = Strips(nn.Conv2d(3, 16, (10, 6), (10, 6)), 0, Pixels((0.5,) * 3, (0.5,) * 3, 60))
    encoder.probe(None)
    return encoder.requires_grad_(False).eval()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("vlmpeft.build")
    monkeypatch.setattr(module, "load_vision", strips)
    monkeypatch.setattr(module, "empty_vision", strips)


def options(name: str) -> list[str]:
    return [f"projector={name}", *(f"projector.{k}={v}" for k, v in SMALL.get(name, {}).items())]


FITTING = [name for name in NAMES if name != "identity"]  # the tiny language model is wider than the encoders


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("encoder", ["6x10", "3x3"])
def test_every_projector_takes_grids_that_are_odd_or_not_square(
    encoder: str, name: str, tiny_recipe: Path, request: pytest.FixtureRequest
) -> None:
    if encoder == "6x10":
        request.getfixturevalue("wide")
    changes = [] if encoder == "6x10" else CONVOLUTION
    bundle = assemble(load_recipe(str(tiny_recipe), [*changes, *options(name)]), CPU, FP32)
    assert "x".join(map(str, bundle.model.vision.grid)) == encoder  # type: ignore[arg-type]
    size = bundle.image_transform.size
    assert bundle.model.image_embeddings(torch.zeros(1, 3, size, size)).shape == (1, bundle.image_tokens, 32)


@pytest.mark.parametrize(("name", "tokens"), [("ldp", 15), ("ldpv2", 144), ("pixel_shuffle", 15), ("linear", 60)])
def test_a_saved_model_gets_its_grid_back_from_the_encoder(
    name: str, tokens: int, tiny_recipe: Path, tmp_path: Path, wide: None
) -> None:
    bundle = vlmpeft.build(load_recipe(str(tiny_recipe), options(name)))
    checkpoint.save(bundle, tmp_path / "model")
    loaded = vlmpeft.load(tmp_path / "model")
    assert loaded.image_tokens == tokens
    pixels = torch.randn(2, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model.image_embeddings(pixels), bundle.model.image_embeddings(pixels))


def test_only_projectors_that_ask_are_told_the_grid(tiny_recipe: Path, wide: None) -> None:
    told = {}
    for name in FITTING:
        projector = assemble(load_recipe(str(tiny_recipe), options(name)), CPU, FP32).model.projector
        told[name] = projector.input_grid if isinstance(projector, GridProjector) else None
    assert {name for name, grid in told.items() if grid == (6, 10)} == {"ldp", "ldpv2", "pixel_shuffle"}


def test_a_grid_projector_of_ones_own_is_told_before_anything_is_asked_of_it(tiny_recipe: Path, wide: None) -> None:
    @PROJECTORS.register("first_row")
    class FirstRow(nn.Linear):
        input_grid: tuple[int, int] | None = None

        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features[:, : self.num_tokens(features.shape[1])])

        def num_tokens(self, n: int) -> int:
            if self.input_grid is None:
                raise AssertionError("asked before it was told")
            return self.input_grid[1]

    recipe = load_recipe(str(tiny_recipe), ["projector=first_row"])
    assert assemble(recipe, CPU, FP32).image_tokens == 10
    assert dry_run(recipe)["pretrain"]


def test_a_grid_too_small_names_encoder_projector_and_factors(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), [*CONVOLUTION, "projector=pixel_shuffle", "projector.factor=4"])
    for build in (lambda: assemble(recipe, CPU, FP32), lambda: dry_run(recipe)):
        with pytest.raises(ModelError) as caught:
            build()
        assert caught.value.code == "M513"
        assert str(caught.value) == (
            "[M513] vision 'timm:test_efficientnet' gives a grid of 3x3 tokens: projector 'pixel_shuffle' joins blocks "
            "of 4x4 vision tokens, the grid is only 3x3. Fix: set projector.factor to 3 or less (to divide the grid "
            "without padding: 1, 3)."
        )


def test_tokens_that_do_not_fill_the_encoders_grid_are_refused_by_both_names(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "num_tokens", property(lambda self: 8))  # as an encoder that drops a patch
    recipe = load_recipe(str(tiny_recipe), [*CONVOLUTION, "projector=ldp"])
    with pytest.raises(
        ModelError, match=r"^\[M513\] vision 'timm:test_efficientnet'.*'ldp' expects the 3x3.*got n=8\."
    ):
        assemble(recipe, CPU, FP32)


@pytest.mark.parametrize("name", ["ldp", "ldpv2", "pixel_shuffle"])
def test_features_of_another_grid_are_refused_at_the_forward(name: str) -> None:
    projector: Any = PROJECTORS.build(name, 4, 8)
    projector.input_grid = (6, 10)
    with pytest.raises(ModelError, match=rf"M513.*'{name}' expects the 6x10 grid.*60 vision tokens.*got n=64"):
        projector(torch.zeros(1, 64, 4))


def test_identity_is_refused_where_the_widths_differ(tiny_recipe: Path) -> None:
    with pytest.raises(ModelError, match=r"M517.*'identity'.* wide .*embeddings 32\."):
        assemble(load_recipe(str(tiny_recipe), ["projector=identity"]), CPU, FP32)
