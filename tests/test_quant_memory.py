"""Memory of quantised weights: measured, foretold from shapes, and by the formula of QLoRA's section 3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quant_models import make_wide, quantised_layers
from tiny_models import our_vlm

from vlmpeft import train
from vlmpeft.build import assemble, dry_weights
from vlmpeft.config import load_recipe
from vlmpeft.quant import QuantConfig, quantise
from vlmpeft.quant_memory import planned_bytes, quantised_bytes

FIXTURES = Path(__file__).parent / "fixtures"
VICUNA = (f"language={FIXTURES / 'vicuna-7b'}", f"vision=hf:{FIXTURES / 'clip-vit-l-336'}")
BITS = {
    QuantConfig(4): 4 + 8 / 64 + 32 / (64 * 256),  # 4.127
    QuantConfig(4, "fp4", block=32): 4 + 8 / 32 + 32 / (32 * 256),
    QuantConfig(4, double=False): 4 + 32 / 64,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wide(tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("config", BITS)
def test_bits_of_a_weight_are_those_of_the_formula(config: QuantConfig, wide: Path) -> None:
    model = our_vlm(wide)
    quantise(model, config)
    assert quantised_bytes(model).bits == pytest.approx(BITS[config], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [*BITS, QuantConfig(8), QuantConfig()])
def test_what_is_foretold_is_what_is_there(config: QuantConfig, dtype: torch.dtype, wide: Path) -> None:
    model = our_vlm(wide, dtype)
    planned = planned_bytes(model, model.parts, config, dtype)
    quantise(model, config)
    assert quantised_bytes(model) == planned
    layers = quantised_layers(model).values()
    assert planned.weights == sum(layer.in_features * layer.out_features for layer in layers)
    if not layers:
        assert planned.total == planned.rest == sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_recipe_foretells_the_model_it_builds(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["quant.bits=4", "vision.image_size=64", "tokens.add=['<spot>']"]
    recipe = load_recipe(str(tiny_recipe), overrides)
    found = quantised_bytes(assemble(recipe, torch.device("cpu"), torch.float32).model)
    assert dry_weights(recipe) == found
    assert train.main([f"recipe={tiny_recipe}", *overrides, "run.dry_run=true"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == found.line()


def test_vicuna_7b_in_nf4() -> None:
    found = dry_weights(load_recipe("llava_qlora", VICUNA))
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.weights == linears
    assert found.packed == linears * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    norms, tables, projector, tower = 65 * 4096, 2 * 32000 * 4096, 20_979_712, 290_909_184
    assert found.rest == 4 * (norms + projector) + 2 * (tables + tower)
    line = "weights: 4.22 GiB = 6,476,005,376 in 4.127 bits (3.11 GiB) + the rest (1.11 GiB)"
    assert found.line() == line
