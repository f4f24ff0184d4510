"""Merged models: no adapters, the same answers, a directory that needs nothing but its encoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from native import logits_of, make_native, native_bundle, native_directory
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import vlmpeft
from vlmpeft import merge
from vlmpeft.checkpoint import save
from vlmpeft.errors import ModelError, run_command
from vlmpeft.manifest import verify
from vlmpeft.merge import write_merged


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_directory(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def merged(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    assert run_command(merge.main, [f"model={directory}", f"out={out}"]) == 0
    return out


def test_it_gives_the_logits_of_the_adapted_model(directory: Path, merged: Path) -> None:
    before, after = (vlmpeft.load(path, device="cpu") for path in (directory, merged))
    expected, found = logits_of(before.model), logits_of(after.model)
    assert (found - expected).abs().max() <= 1e-5
    with before.tuned.disable():
        assert not torch.allclose(logits_of(before.model), expected, atol=1e-2)  # the adapters do something
    ask: dict[str, Any] = {"max_new_tokens": 6}
    assert after.generate(None, "What is shown?", **ask) == before.generate(None, "What is shown?", **ask)


def test_it_may_be_moved(directory: Path, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "there")
    ids = torch.tensor([[7, 8, 9]])
    moved = tmp_path / "elsewhere"
    (tmp_path / "there").rename(moved)
    bundle = vlmpeft.load(moved, device="cpu")
    assert bundle.recipe.language.name == str(moved / "language")
    assert torch.equal(bundle.model(ids).logits, vlmpeft.load(merged, device="cpu").model(ids).logits)


def test_nothing_of_the_adapters_is_left(directory: Path, merged: Path) -> None:
    bundle = vlmpeft.load(merged, device="cpu")
    names = {name for name, _ in bundle.model.named_parameters()}
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert not bundle.tuned.applied
    assert not any(p.requires_grad for p in bundle.model.parameters())
    assert not (merged / "adapters").exists()
    before = vlmpeft.load(directory, device="cpu")
    assert (bundle.image_transform, bundle.stage.template) == (before.image_transform, before.stage.template)


def test_it_is_a_whole_directory_that_needs_the_old_language_model_no_more(
    directory: Path, merged: Path, tmp_path: Path
) -> None:
    manifest = verify(merged)
    assert manifest["base"]["language"]["name"] == str(merged / "language")
    assert manifest["base"]["language"]["fingerprint"] != verify(directory)["base"]["language"]["fingerprint"]
    assert "language/model.safetensors" in manifest["files"]
    alone: Any = AutoModelForCausalLM.from_pretrained(merged / "language")
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, vlmpeft.load(merged, device="cpu").model(ids).logits)


def test_training_goes_on_from_it(merged: Path) -> None:
    """`language=OUT/language init=OUT`: the merged model is the base of the next run."""
    from vlmpeft.build import build
    from vlmpeft.config import load_recipe
    from vlmpeft.start import start_from

    recipe = load_recipe(str(merged / "recipe.yaml"), ["stages.instruct.lora.r=2"])
    bundle = build(recipe)
    start_from(bundle.model, bundle.recipe, bundle.fingerprints, merged)
    loaded = vlmpeft.load(merged, device="cpu")
    assert torch.equal(logits_of(bundle.model), logits_of(loaded.model))
    assert {name.rsplit(".", 2)[1] for name in bundle.tuned.trainable()} == {"lora_A", "lora_B"}


def test_a_tuned_encoder_and_a_fully_tuned_language_model_come_along(tmp_path: Path) -> None:
    tuners = "tuners.seeing={kind: lora, part: vision, r: 2}", "tuners.words={kind: full, part: language}"
    bundle = native_bundle(make_native(tmp_path), *(f"stages.instruct.{text}" for text in tuners))
    save(bundle, tmp_path / "final")
    write_merged(vlmpeft.load(tmp_path / "final", device="cpu"), tmp_path / "merged")
    loaded = vlmpeft.load(tmp_path / "merged", device="cpu")
    assert (logits_of(loaded.model) - logits_of(bundle.model)).abs().max() <= 1e-4  # the encoder's sums are large
    assert set(loaded.tuned.applied) == {"vision"}
    assert all(name.startswith("vision.") for name in load_file(tmp_path / "merged" / "trained.safetensors"))


def test_half_precision_rounds_once(directory: Path, tmp_path: Path) -> None:
    arguments = [f"model={directory}", f"out={tmp_path / 'half'}", "dtype=bf16"]
    assert run_command(merge.main, arguments) == 0
    half = load_file(tmp_path / "half" / "language" / "model.safetensors")
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    bundle = vlmpeft.load(directory, device="cpu", dtype=torch.bfloat16)
    layer = bundle.model.language.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double() + layer.delta().double()
    torch.testing.assert_close(half["model.layers.0.self_attn.q_proj.weight"].double(), exact, rtol=2**-8, atol=1e-6)


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    recipe = make_native(tmp_path)
    bundle = native_bundle(recipe, "stages.instruct.tuners.head={kind: lora, part: lm_head, r: 2}")
    with pytest.raises(ModelError, match="M555"):
        write_merged(bundle, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_wrong_arguments_and_directories_are_refused(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(merge.main, [f"model={directory}", f"out={tmp_path / 'x'}", "dtype=fp8"]) == 2
    assert "error[C102] dtype=fp8" in capsys.readouterr().err
    shutil.copytree(directory, tmp_path / "copy")
    assert run_command(merge.main, [f"model={tmp_path / 'copy'}", f"out={tmp_path / 'copy'}"]) == 2
    assert "error[C112]" in capsys.readouterr().err
    assert run_command(merge.main, [f"model={tmp_path / 'none'}", f"out={tmp_path / 'x'}"]) == 5
    assert "error[K202]" in capsys.readouterr().err
