"""A model directory alone is the whole model, and is believed only if it fits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_language
from PIL import Image
from runs import FAST, make_bundle, some_logits
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import vlmpeft
from vlmpeft import checkpoint
from vlmpeft.build import Bundle, assemble, enter_stage
from vlmpeft.config import load_recipe
from vlmpeft.errors import ModelError, VlmpeftError
from vlmpeft.manifest import MANIFEST, verify, write_manifest
from vlmpeft.start import start_from


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path) -> Bundle:
    return make_bundle(tiny_recipe)


@pytest.fixture(scope="module")
def saved(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "step-1"
    checkpoint.save(bundle, directory)
    return directory


def test_loaded_model_gives_equal_logits_and_answers(bundle: Bundle, saved: Path) -> None:
    loaded = vlmpeft.load(saved, device="cpu")
    assert torch.equal(some_logits(loaded), some_logits(bundle))
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    ask = {"max_new_tokens": 4}
    assert loaded.generate(picture, "What is shown?", **ask) == bundle.generate(picture, "What is shown?", **ask)
    assert loaded.stage == bundle.stage
    assert loaded.image_transform == bundle.image_transform


def test_saved_again_it_is_the_same_directory(saved: Path, tmp_path: Path) -> None:
    checkpoint.save(vlmpeft.load(saved, device="cpu"), tmp_path / "again")
    files = sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file())
    assert [p for p in files if (saved / p).read_bytes() != (tmp_path / "again" / p).read_bytes()] == []


def test_manifest_tells_what_it_is(bundle: Bundle, saved: Path) -> None:
    manifest = verify(saved)
    trainable = {n for n, p in bundle.model.named_parameters() if p.requires_grad}
    assert set(manifest["trained"]) == trainable
    assert manifest["stage"] == "instruct"
    assert manifest["template"] == "chatml"
    assert manifest["tuners"]["lora"] == {"kind": "lora", "part": "language"}
    assert set(manifest["base"]) == {"vision", "language"}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    listed = {*manifest["files"], MANIFEST}
    assert listed == {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}


def test_whole_directory_is_readable_as_the_umask_says(saved: Path) -> None:
    import os

    umask = os.umask(0)
    os.umask(umask)
    assert {oct(p.stat().st_mode & 0o777) for p in saved.rglob("*") if p.is_file()} == {oct(0o666 & ~umask)}
    assert {oct(p.stat().st_mode & 0o777) for p in [saved, *saved.rglob("*")] if p.is_dir()} == {oct(0o777 & ~umask)}


def test_something_unfrozen_behind_the_tuners_back_is_m504_and_nothing_is_left(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    other = make_bundle(tiny_recipe)
    other.model.language.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ModelError) as caught:
        checkpoint.save(other, tmp_path / "step-1")
    assert caught.value.code == "M504"
    assert "embed_tokens.weight" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_every_stage_is_reloaded_with_what_the_earlier_ones_trained(tiny_recipe: Path, tmp_path: Path) -> None:
    """Stage 2 may leave the projector alone; its checkpoint still holds the one of stage 1."""
    recipe = load_recipe(str(tiny_recipe), [*FAST, "stages.instruct.tuners.projector=null"])
    made = assemble(recipe, torch.device("cpu"), torch.float32)
    for name, stage in recipe.stages.items():
        enter_stage(made, stage)
        with torch.no_grad():
            for parameter in made.tuned.trainable().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        checkpoint.save(made, tmp_path / name)
        assert torch.equal(some_logits(vlmpeft.load(tmp_path / name, device="cpu")), some_logits(made))
    first, second = (load_file(tmp_path / name / "projector.safetensors") for name in recipe.stages)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (tmp_path / "pretrain" / "adapters").exists()


def test_stages_with_equal_settings_are_told_apart(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), FAST)
    stage = recipe.stages["pretrain"]
    recipe = dataclasses.replace(recipe, stages={"one": stage, "two": dataclasses.replace(stage)})
    made = assemble(recipe, torch.device("cpu"), torch.float32)
    enter_stage(made, recipe.stages["two"])
    checkpoint.save(made, tmp_path / "made")
    assert verify(tmp_path / "made")["stage"] == "two"


def other_language(folder: Path, seed: int) -> Path:
    """A base of the same shapes; seed 0 gives the same weights too."""
    make_language(folder)
    if seed:
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaForCausalLM.from_pretrained(folder).config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("seed", "fits"), [(0, True), (5, False)])
def test_base_of_equal_shapes_but_other_weights_is_m501(
    seed: int, fits: bool, tiny_recipe: Path, saved: Path, tmp_path: Path
) -> None:
    """A renamed copy of the right one passes."""
    recipe = load_recipe(str(tiny_recipe), [*FAST, f"language.name={other_language(tmp_path / 'base', seed)}"])
    made = assemble(recipe, torch.device("cpu"), torch.float32)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    if fits:
        checkpoint.restore(made, saved, verify(saved))
        return
    for bring in (
        lambda: checkpoint.restore(made, saved, verify(saved)),
        lambda: start_from(made.model, made.recipe, made.fingerprints, saved),
    ):
        with pytest.raises(ModelError) as caught:
            bring()
        assert caught.value.code == "M501"
        assert "language" in caught.value.message
    assert all(torch.equal(before[k], v) for k, v in made.model.state_dict().items())
    allowed = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, allow_base_mismatch=True))
    checkpoint.restore(dataclasses.replace(made, recipe=allowed), saved, verify(saved))


def rewrite(directory: Path, file: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change a tensor file and bring the manifest up to date, as a damage that no hash can find."""
    tensors = change(load_file(directory / file))
    save_file(tensors, directory / file)
    entries: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).unlink()
    write_manifest(directory, {k: v for k, v in entries.items() if k not in ("files", "seal")})


def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = max(tensors)
    tensors[name].view(-1)[0] = float("nan")
    return tensors


def drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: tensors[k] for k in sorted(tensors)[1:]}


def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([v, v]) for k, v in tensors.items()}


FILES = ("adapters/lora/adapter_model.safetensors", "projector.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("change", "code"), [(poison, "M503"), (drop, "M502"), (widen, "M502")])
def test_tensors_that_do_not_fit_are_refused_whatever_the_hashes_say(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    code: str,
    file: str,
    saved: Path,
    tmp_path: Path,
) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "made"))
    rewrite(directory, file, change)
    verify(directory)
    with pytest.raises(VlmpeftError) as caught:
        vlmpeft.load(directory, device="cpu")
    assert caught.value.code == code
    assert file.rsplit("/", 1)[-1] in caught.value.message


def test_refused_tensors_change_nothing(tiny_recipe: Path, saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "made"))
    rewrite(directory, FILES[1], poison)
    made = make_bundle(tiny_recipe, seed=3)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    with pytest.raises(ModelError):
        checkpoint.restore_weights(made, directory)
    assert all(torch.equal(before[k], v) for k, v in made.model.state_dict().items())


def test_a_built_model_starts_from_the_projector_that_its_recipe_names(tiny_recipe: Path, tmp_path: Path) -> None:
    first = make_bundle(tiny_recipe, "stages.instruct=null", seed=1)
    with torch.no_grad():
        for parameter in first.model.projector.parameters():
            parameter.add_(1)
    checkpoint.save(first, tmp_path / "first")
    built = vlmpeft.build(load_recipe(str(tiny_recipe), [*FAST, f"init={tmp_path / 'first'}"]))
    expected = first.model.projector.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in built.model.projector.state_dict().items())


def test_start_from_a_run_that_tuned_more_is_m533(tiny_recipe: Path, saved: Path) -> None:
    made = assemble(load_recipe(str(tiny_recipe), FAST), torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError) as caught:
        start_from(made.model, made.recipe, made.fingerprints, saved)
    assert caught.value.code == "M533"
