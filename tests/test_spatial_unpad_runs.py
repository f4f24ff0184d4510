"""Whole models whose tiles merge by spatial_unpad: data, answers, training, files, and exports to LLaVA-NeXT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native import make_native, native_bundle
from PIL import Image
from runs import metrics, run_train, tensors, vary
from safetensors.torch import load_file, save_file
from test_anyres import PICTURES, noise
from test_anyres import folder as folder  # the pictures of four shapes and the records that show them
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

import vlmpeft
from vlmpeft import export
from vlmpeft.batch import IMAGE_TOKEN_ID, collate
from vlmpeft.build import Bundle, dry_run, empty_bundle
from vlmpeft.checkpoint import save
from vlmpeft.config import load_recipe
from vlmpeft.data import Samples, load_batches
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.decode import Request
from vlmpeft.errors import ConfigError, ModelError, run_command
from vlmpeft.eval import pope
from vlmpeft.features import cache_features
from vlmpeft.hf_llava import export_hf
from vlmpeft.images import ImageReader
from vlmpeft.llava_layout import read_llava
from vlmpeft.lmar_heat import Chosen, heats
from vlmpeft.lmar_samples import answered_by_data, with_images
from vlmpeft.prepare import prepare
from vlmpeft.record_encoder import Preparation
from vlmpeft.start import start_from
from vlmpeft.template import IMAGE, Exchange

UNPAD = ("data.image_mode=anyres", "data.tile_merge=spatial_unpad")


def overrides(folder: Path) -> list[str]:
    files = [f"data.{key}={folder / 'train.json'}" for key in ("pretrain", "instruct")]
    return ["vision.image_size=64", *UNPAD, f"data.images={folder / 'images'}", *files]


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path, folder: Path) -> Bundle:
    return vary(vlmpeft.build(load_recipe(str(tiny_recipe), overrides(folder))))


def tokens_of(bundle: Bundle, path: Path) -> int:
    return bundle.turn_encoder().tokens_of(ImageReader(bundle.image_transform).tiling(path))


def test_the_newline_is_counted_trained_and_saved_with_the_projector(
    tiny_recipe: Path, folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(str(tiny_recipe), ["vision.image_size=64"])
    bundle = vlmpeft.build(load_recipe(str(tiny_recipe), overrides(folder)))
    rows = {row["part"]: row for row in bundle.tuned.table()}
    flat = {row["part"]: row for row in vlmpeft.build(recipe).tuned.table()}
    for key in ("trainable", "total"):
        assert rows["projector"][key] == flat["projector"][key] + 32  # type: ignore[operator]
    assert "other" not in rows
    assert dry_run(bundle.recipe)["instruct"] == bundle.tuned.table()
    save(bundle, tmp_path / "model")
    file = tmp_path / "model" / "projector.safetensors"
    newline = bundle.model.projector.get_parameter("image_newline")
    assert torch.equal(load_file(file)["image_newline"], newline)
    loaded = vlmpeft.load(tmp_path / "model", device="cpu")
    assert torch.equal(loaded.model.projector.get_parameter("image_newline"), newline)
    assert loaded.image_transform == bundle.image_transform
    assert loaded.model.view_grid == bundle.model.view_grid
    save_file({k: v for k, v in load_file(file).items() if k != "image_newline"}, file)
    with pytest.raises(ModelError, match=r"M502.*lacks tensor 'image_newline'"):
        bundle.tuned.load(tmp_path / "model")


def test_a_run_starts_from_a_projector_of_its_own_merge_alone(tiny_recipe: Path, folder: Path, tmp_path: Path) -> None:
    more = {"spatial_unpad": overrides(folder), "flat": [*overrides(folder), "data.tile_merge=flat"]}
    recipes = {merge: load_recipe(str(tiny_recipe), [*more[merge], "stages.instruct.lora=null"]) for merge in more}
    bundles = {merge: vlmpeft.build(recipe) for merge, recipe in recipes.items()}
    for merge, made in bundles.items():
        save(made, tmp_path / merge)
    for merge, other in (("flat", "spatial_unpad"), ("spatial_unpad", "flat")):
        start_from(bundles[merge].model, bundles[merge].recipe, bundles[merge].fingerprints, tmp_path / merge)
        with pytest.raises(ModelError, match=rf"M502.*trained with data.tile_merge={other}, this run has another"):
            start_from(bundles[merge].model, bundles[merge].recipe, bundles[merge].fingerprints, tmp_path / other)


def test_records_have_room_for_their_images_and_text_rows_for_none(bundle: Bundle, folder: Path) -> None:
    read = ImageReader(bundle.image_transform)
    config = DataConfig(images=str(folder / "images"), image_mode="anyres", tile_merge="spatial_unpad", max_length=512)
    how = Preparation(config, bundle.turn_encoder(), tiling=read.tiling)
    found = prepare([DataFile(str(folder / "train.json"))], how).samples
    batch = next(load_batches(Samples(found, read), [list(range(8))], 0)).batch
    expected = [sum(tokens_of(bundle, path) for path in sample.images) for sample in found]
    assert (batch.input_ids == IMAGE_TOKEN_ID).sum(1).tolist() == expected
    assert 0 in expected
    assert len(set(expected)) > 4
    assert batch.tilings == tuple(read.tiling(path) for sample in found for path in sample.images)
    assert torch.isfinite(bundle.model(**batch.inputs()).loss)
    pinned = batch.to("meta")
    assert pinned.tilings == batch.tilings


@torch.no_grad()
def test_cached_features_give_the_same_logits_as_pixels(bundle: Bundle, folder: Path) -> None:
    read, vision = ImageReader(bundle.image_transform), bundle.model.vision
    paths = sorted((folder / "images").iterdir())
    features = cache_features(vision, read, paths, batch_size=3)  # type: ignore[arg-type]
    encoder = bundle.turn_encoder()
    encodings = [encoder.encode([Exchange((IMAGE, "What?"), "Yes")], tilings=[read.tiling(path)]) for path in paths]
    losses = [
        bundle.model(**collate(encodings, [view for path in paths for view in load(path)]).inputs()).loss
        for load in (read, features)
    ]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-5)


def test_batched_answers_and_likelihoods_equal_those_one_by_one(bundle: Bundle, folder: Path) -> None:
    paths = [folder / "images" / name for name in PICTURES]
    asked = [Request((path,), text) for text in ("What?", "Is there a red image?") for path in paths]
    asked += [Request((paths[0], paths[3]), "Alike?"), Request((paths[3], paths[0]), "Alike?"), Request((), "Why?")]
    options: dict[str, Any] = {"max_new_tokens": 6, "contrast": ("Yes", "No")}
    alone = [bundle.answer([request], **options)[0] for request in asked]
    assert len({a.text for a in alone}) > 6
    for size in (3, 16):
        together = bundle.answer(asked, batch_size=size, **options)
        assert [a.text for a in together] == [a.text for a in alone]
        margins = [[a.margin for a in answers] for answers in (together, alone)]
        assert margins[0] == pytest.approx(margins[1], abs=1e-3)
    chosen = [Request(r.images, r.prompt, ("a red square", "Yes", "blue")) for r in asked]
    one = [found.log_probability for r in chosen for found in bundle.likelihoods([r])[0]]
    many = [found.log_probability for row in bundle.likelihoods(chosen, batch_size=5) for found in row]
    assert many == pytest.approx(one, abs=1e-3)
    picture = Request((Image.open(paths[1]),), "What?")
    assert bundle.answer([picture], **options)[0].text == alone[1].text


def test_pope_and_heat_maps_see_merged_tiles(bundle: Bundle, folder: Path) -> None:
    questions = pope.read_questions(str(folder / "pope.jsonl"))
    rows, scores = pope.evaluate(bundle, questions, folder / "images", batch_size=3, max_new_tokens=2, progress=False)
    assert scores["n"] == len(rows) == 8
    shown = answered_by_data(bundle, with_images(str(folder / "train.json"), str(folder / "images"), 2))
    [found] = heats(bundle, shown[1], Chosen(1, ()), "map")  # of the whole image, which comes before the tiles
    assert found.weights.shape == bundle.model.view_grid
    assert found.box == (0, 0, *PICTURES["wide.png"])
    assert found.weights.min() >= 0
    assert 0 < found.weights.sum() <= 1


@pytest.mark.parametrize("extra", [(), ("data.cache_features=true", "data.image_mode=pad"), ("projector=ldpv2",)])
def test_a_run_trains_its_newline_and_is_loaded_with_it(
    extra: tuple[str, ...], tiny_recipe: Path, folder: Path, tmp_path: Path
) -> None:
    more = [*overrides(folder), "stages.pretrain=null", "stages.instruct.optim.steps=3", "run.save_every=0", *extra]
    more += ["projector.grid=2"] if "projector=ldpv2" in extra else []
    more += ["data.max_length=512"]
    assert run_train(tiny_recipe, tmp_path, *more) == 0
    assert len(metrics(tmp_path)) == 3
    loaded = vlmpeft.load(tmp_path / "final", device="cpu")
    start = vlmpeft.build(loaded.recipe).model.projector.get_parameter("image_newline")
    trained = loaded.model.projector.get_parameter("image_newline")
    assert (trained - start).abs().max() > 1e-4
    assert isinstance(loaded.generate(folder / "images" / "wide.png", "What?", max_new_tokens=3), str)
    assert "projector.safetensors" in tensors(tmp_path / "final")


def test_a_steered_model_trains_on_merged_tiles(tiny_recipe: Path, folder: Path, tmp_path: Path) -> None:
    more = [*overrides(folder), "stages.pretrain=null", "stages.instruct.optim.steps=2", "run.save_every=0"]
    more += ["data.max_length=512", "stages.instruct.tuners.lora=null", "stages.instruct.mores.positions=ratio:0.1"]
    assert run_train(tiny_recipe, tmp_path, *more) == 0
    assert len(metrics(tmp_path)) == 2


def test_tokens_that_lie_on_no_grid_are_refused_before_anything_is_loaded(tiny_recipe: Path, folder: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), [*overrides(folder), "projector=resampler", "projector.queries=4"])
    for make in (vlmpeft.build, empty_bundle, dry_run):
        with pytest.raises(ModelError, match=r"M513.*resampler.*no known grid.*spatial_unpad.*tile_merge=flat"):
            make(recipe)
    with pytest.raises(ConfigError, match="tile_merge"):
        load_recipe(str(tiny_recipe), ["data.tile_merge=spatial"])


@pytest.fixture(scope="module", params=["clip", "siglip"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    made = native_bundle(make_native(folder, request.param), *UNPAD)
    made.tuned.merge_and_unload()
    return made


@torch.no_grad()
def test_the_exported_llava_next_has_our_tokens_pixels_and_logits(native: Bundle, tmp_path: Path) -> None:
    export_hf(native, tmp_path / "out")
    model, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    newline = native.model.projector.get_parameter("image_newline")
    assert torch.equal(model.model.image_newline, newline)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["image_newline"], newline)
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    read, encoder = ImageReader(native.image_transform), native.turn_encoder()
    for size in ((70, 41), (41, 70), (64, 64), (150, 33)):
        picture = noise(*size)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        theirs = processor(text=prompt, images=picture, return_tensors="pt")
        ours = encoder.encode([Exchange((IMAGE, "\nWhat is shown?"))], tilings=[read.tiling(picture)])
        image_id = model.config.image_token_id
        assert [image_id if i == IMAGE_TOKEN_ID else i for i in ours.input_ids] == theirs["input_ids"][0].tolist()
        batch = collate([ours], list(read(picture)))
        assert batch.pixel_values is not None
        torch.testing.assert_close(theirs["pixel_values"][0], batch.pixel_values, atol=1e-6, rtol=0)
        found = native.model(batch.input_ids, pixel_values=batch.pixel_values, tilings=batch.tilings).logits
        expected = model(**theirs).logits[..., : found.shape[-1]]
        assert (found - expected).abs().max() <= 1e-5


def test_a_llava_next_directory_is_read_back_bit_for_bit(native: Bundle, tmp_path: Path) -> None:
    export_hf(native, tmp_path / "out")
    rows = native.model.language.get_input_embeddings().weight.shape[0]
    back = read_llava(tmp_path / "out", rows)
    for name, tensor in native.model.projector.state_dict().items():
        assert torch.equal(back[f"projector.{name}"], tensor)
    LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    theirs = read_llava(tmp_path / "theirs", rows)
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in back.items())


def test_other_formats_hold_it_or_refuse_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = make_native(tmp_path)
    save(native_bundle(recipe, *UNPAD), tmp_path / "tiled")
    save(native_bundle(recipe, UNPAD[1]), tmp_path / "padded")
    save(native_bundle(recipe, UNPAD[0]), tmp_path / "flat")
    assert run_command(export.main, [f"model={tmp_path / 'tiled'}", "to=llava", f"out={tmp_path / 'out'}"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
    assert config["image_grid_pinpoints"] == [[64, 32], [32, 64], [64, 64], [32, 96], [96, 32]]  # width, height
    assert "model.image_newline" in load_file(tmp_path / "out" / "model.safetensors")
    assert "projector.image_newline" in read_llava(tmp_path / "out")
    for model, to, says in (
        ("tiled", "peft", "the newline of data.tile_merge=spatial_unpad has no form in a peft adapter"),
        ("padded", "hf", "data.tile_merge=spatial_unpad with image_mode=pad has no form in transformers' LlavaNext"),
        ("padded", "llava", "data.tile_merge=spatial_unpad with image_mode=pad has no form in LLaVA's"),
        ("flat", "hf", "image_mode=anyres with data.tile_merge=flat has no form in transformers' LlavaFor"),
    ):
        arguments = [f"model={tmp_path / model}", f"to={to}", f"out={tmp_path / f'{model}-{to}'}"]
        assert run_command(export.main, arguments) == 4
        assert f"error[M570] {says}" in capfd.readouterr().err
