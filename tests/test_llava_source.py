"""Runs that start from a LLaVA or LLaVA-NeXT of transformers: its parts, its logits, what a recipe may say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_starts import PINPOINTS, SIZE, TOKENS, make_recipe, make_start
from huggingface_hub import constants
from runs import metrics
from safetensors.torch import load_file, save_file
from test_anyres import noise
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmpeft
from vlmpeft import inspect, train
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.build import dry_run, empty_bundle
from vlmpeft.checkpoint import save
from vlmpeft.config import load_recipe, recipe_of, to_yaml
from vlmpeft.errors import CheckpointError, ConfigError, EnvironmentFault, ModelError, run_command
from vlmpeft.hf_llava import export_hf
from vlmpeft.images import ImageReader

STARTS = [
    ("clip", "present"),
    ("clip", "hub"),
    ("clip", "memory"),
    ("siglip", "present"),
    ("siglip", "hub"),
    ("next", "present"),
]


@pytest.fixture(scope="module", params=STARTS, ids="-".join)
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A kind, its directory and a recipe over it."""
    kind, names = request.param
    folder = tmp_path_factory.mktemp(kind)
    model = make_start(folder / "llava", kind, names)
    return kind, model, make_recipe(folder, model)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CLIP start and a recipe over it."""
    folder = tmp_path_factory.mktemp("clip")
    model = make_start(folder / "llava")
    return model, make_recipe(folder, model)


def their_model(directory: Path) -> Any:
    load: Any = AutoModelForImageTextToText.from_pretrained
    return load(directory).eval()


@torch.no_grad()
def both_logits(
    bundle: vlmpeft.Bundle, directory: Path, theirs: Any, sizes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Our logits and transformers' for a question about pictures of these sizes, pixels made by its processor."""
    processor: Any = AutoProcessor.from_pretrained(directory, backend="pil")
    pictures = [noise(*size) for size in sizes]
    text = "<image>" * len(pictures) + "What is shown?"
    inputs = processor(text=text, images=pictures or None, return_tensors="pt")
    tilings = [ImageReader(bundle.image_transform).tiling(picture) for picture in pictures]
    encoder, ids = bundle.turn_encoder(), inputs["input_ids"].clone()
    image = ids == theirs.config.image_token_id
    assert image.sum() == sum(map(encoder.tokens_of, tilings))
    pixels = inputs.get("pixel_values")
    if pixels is not None and pixels.ndim == 5:  # (pictures, most views, 3, h, w), those with fewer padded
        pixels = torch.cat([p[: tiling.views] for p, tiling in zip(pixels, tilings, strict=True)])
    ours = bundle.model(ids.masked_fill(image, IMAGE_TOKEN_ID), pixel_values=pixels, tilings=tilings or None).logits
    return ours[0], theirs(**inputs).logits[0]


def test_an_untrained_start_is_saved_and_loaded_with_transformers_logits(
    start: tuple[str, Path, Path], tmp_path: Path
) -> None:
    kind, model, recipe = start
    bundle = vlmpeft.build(load_recipe(str(recipe)))
    save(bundle, tmp_path / "model")
    loaded, theirs = vlmpeft.load(tmp_path / "model", device="cpu"), their_model(model)
    assert loaded.recipe == bundle.recipe
    for sizes in ([], [(50, 30)], [(70, 41), (30, 80), (64, 64)]):
        ours, expected = both_logits(loaded, model, theirs, sizes)
        assert expected.std() > 0.1
        assert (ours - expected).abs().max() <= 1e-5
    assert (loaded.model.view_grid is None) == (kind != "next")
    assert loaded.image_tokens == TOKENS


def test_a_run_trains_from_it_and_leaves_its_parts_as_they_were(
    start: tuple[str, Path, Path], data_dir: Path, tmp_path: Path
) -> None:
    kind, model, recipe = start
    more = [f"data.instruct={data_dir / 'instruct.json'}", f"data.images={data_dir / 'images'}", "data.max_length=512"]
    assert run_command(train.main, [f"recipe={recipe}", f"run.dir={tmp_path}", *more]) == 0
    assert len(metrics(tmp_path)) == 2
    loaded, theirs = vlmpeft.load(tmp_path / "final", device="cpu"), their_model(model)
    before = theirs.model.multi_modal_projector.state_dict()
    names = {"0": "linear_1", "2": "linear_2"}
    for ours, linear in names.items():
        trained = loaded.model.projector[int(ours)].weight  # type: ignore[index]
        assert 0 < (trained - before[f"{linear}.weight"]).abs().max() < 0.1
        loaded.model.projector[int(ours)].load_state_dict(
            theirs.model.multi_modal_projector.get_submodule(linear).state_dict()
        )  # type: ignore[index]
    if kind == "next":
        newline = loaded.model.projector.get_parameter("image_newline")
        assert 0 < (newline - theirs.model.image_newline).abs().max() < 0.1
        newline.data.copy_(theirs.model.image_newline)
    ours, expected = both_logits(loaded, model, theirs, [(50, 30)])
    assert (ours - expected).abs().max() > 1e-2  # the adapters
    with loaded.tuned.disable():
        ours, expected = both_logits(loaded, model, theirs, [(50, 30)])
    assert (ours - expected).abs().max() <= 1e-5


def test_what_came_from_transformers_goes_back_there(start: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, model, recipe = start
    mode = [] if kind == "next" else ["data.image_mode=square"]
    bundle = vlmpeft.build(load_recipe(str(recipe), mode))
    export_hf(bundle, tmp_path / "out")
    first, again = their_model(model).state_dict(), their_model(tmp_path / "out").state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())


def test_it_decides_what_it_was_trained_with(start: tuple[str, Path, Path]) -> None:
    kind, model, recipe = start
    found = load_recipe(str(recipe))
    assert found.vision.name == f"hf:{model}"
    assert found.vision.layer == {"siglip": -1}.get(kind, -2)
    assert found.language.name == str(model)
    assert found.projector.name == "mlp2x_gelu"
    tiled = kind == "next"
    assert (found.data.tile_merge, found.data.image_mode) == (("spatial_unpad", "anyres") if tiled else ("flat", "pad"))
    if tiled:
        assert found.data.tiles == tuple((h // SIZE, w // SIZE) for h, w in PINPOINTS)
    trained = {row["part"]: row["trainable"] for row in dry_run(found)["instruct"]}
    assert trained["projector"] == 16 * 32 + 32 * 32 + 64 + 32 * tiled
    assert empty_bundle(found).image_tokens == TOKENS


def test_a_recipe_of_other_parts_takes_the_starts_and_what_is_typed_must_agree(
    clip: tuple[Path, Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    model, _ = clip
    given = ["projector=ldpv2", "projector.grid=2", "vision.image_size=64", "tokens.add=[<cat>]"]
    old = tmp_path / "old.yaml"
    old.write_text(to_yaml(load_recipe(str(tiny_recipe), given)))
    found = load_recipe(str(old), [f"init=hf:{model}", "data.image_mode=square", "projector.dropout=0.1"])
    assert found.vision == load_recipe(str(clip[1])).vision
    assert (found.language.name, found.projector.name) == (str(model), "mlp2x_gelu")
    assert found.projector.options == {"dropout": 0.1}
    assert found.data.image_mode == "square"
    assert found.tokens.add == ("<cat>",)
    (tmp_path / "again.yaml").write_text(to_yaml(found))
    assert load_recipe(str(tmp_path / "again.yaml")) == found
    assert recipe_of({}, {"init": f"hf:{model}", "lora": {"r": 2}}).vision == found.vision
    for key in (
        "vision=timm:vit_tiny_patch16_224",
        "vision.layer=-1",
        "projector=linear",
        "data.tile_merge=spatial_unpad",
    ):
        name = {"vision": "vision.name", "projector": "projector.name"}.get(key.split("=")[0], key.split("=")[0])
        with pytest.raises(ConfigError, match=rf"C113.*{name}=.*was trained with.*leave {name} out") as raised:
            load_recipe(str(old), [f"init=hf:{model}", key])
        assert "\n" not in raised.value.line()


def changed(config: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        config = config[part]
    config[last] = value


REFUSED: list[tuple[str, str, Any, str]] = [
    ("clip", "vision_feature_select_strategy", "full", "keeps the CLS token"),
    ("clip", "vision_feature_layer", [-2, -1], r"joins the layers \[-2, -1\]"),
    ("clip", "projector_hidden_act", "relu", "another projector"),
    ("clip", "multimodal_projector_bias", False, "another projector"),
    ("clip", "quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "is quantised"),
    ("clip", "model_type", "vipllava", "is a vipllava model"),
    ("clip", "vision_config", {"model_type": "pixtral"}, "has the encoder pixtral"),
    ("next", "image_grid_pinpoints", [[48, 32]], r"tiles images as \[48, 32\] pixels, which is no grid of 32"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "key", "value", "says"), REFUSED, ids=[f"{key}" for _, key, _, _ in REFUSED])
def test_a_model_that_our_parts_cannot_be_is_refused_in_a_line(
    kind: str, key: str, value: Any, says: str, tmp_path: Path
) -> None:
    model = make_start(tmp_path / "llava", kind)
    config = json.loads((model / "config.json").read_text())
    changed(config, key, value)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"M572.*init=hf:.*{says}.*vlmpeft.tune"):
        load_recipe(str(make_recipe(tmp_path, model)))


def test_siglip_without_its_first_patch_is_tinyllavas_selection(tmp_path: Path) -> None:
    model = make_start(tmp_path / "llava", "siglip", vision_feature_select_strategy="default")
    found = load_recipe(str(make_recipe(tmp_path, model)))
    assert found.vision.compat == "tinyllava_siglip"
    bundle, theirs = vlmpeft.build(found), their_model(model)
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.get_image_features(pixels).pooler_output[0]
        torch.testing.assert_close(bundle.model.image_embeddings(pixels)[0], expected, atol=1e-5, rtol=0)
    assert bundle.image_tokens == TOKENS - 1


def test_a_directory_without_a_tensor_is_refused(tmp_path: Path) -> None:
    def without(*beginnings: str) -> Callable[[], object]:
        model = make_start(tmp_path / beginnings[0].replace(".", "-"))
        tensors = load_file(model / "model.safetensors")
        kept = {k: v for k, v in tensors.items() if not k.startswith(beginnings)}
        assert len(kept) < len(tensors)
        save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
        return lambda: vlmpeft.build(load_recipe(str(make_recipe(tmp_path, model))))

    for beginning, says in (
        ("multi_modal_projector.linear_2.bias", r"M502.*lacks tensor '2.bias'"),
        ("multi_modal_projector.", "M571.*holds no projector"),
        ("vision_tower.encoder.layers.1.", "M548.*lack 16 tensors"),
        ("language_model.lm_head", "M548.*lack 1 tensors.*'lm_head.weight'"),
    ):
        with pytest.raises(ModelError, match=says):
            without(beginning)()


def test_a_hub_id_is_read_from_the_cache(
    clip: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--someone--llava" / "snapshots" / ("0" * 40)
    shutil.copytree(clip[0], snapshot)
    (tmp_path / "models--someone--llava" / "refs").mkdir()
    (tmp_path / "models--someone--llava" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = load_recipe(str(clip[1]), ["init=hf:someone/llava"])
    assert found.language.name == "someone/llava"
    bundle = vlmpeft.build(found)
    expected = their_model(clip[0]).model.multi_modal_projector.linear_1.weight
    assert torch.equal(bundle.model.projector[0].weight, expected)  # type: ignore[index]
    with pytest.raises(EnvironmentFault, match=r"E420.*'someone/other'"):
        load_recipe(str(clip[1]), ["init=hf:someone/other"])


def test_a_start_of_the_wrong_kind_says_what_to_write(
    clip: tuple[Path, Path], tiny_recipe: Path, language_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"K202.*directory of transformers.*write init=hf:{clip[0]}"):
        vlmpeft.build(load_recipe(str(tiny_recipe), [f"init={clip[0]}", "vision.image_size=64"]))
    with pytest.raises(ModelError, match=r"M572.*is a llama model"):
        load_recipe(str(tiny_recipe), [f"init=hf:{language_dir}"])
    with pytest.raises(ModelError, match="M547"):
        load_recipe(str(tiny_recipe), [f"init=hf:{tmp_path}"])


def test_inspect_needs_no_more_than_the_start(
    clip: tuple[Path, Path], data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"data.instruct={data_dir / 'instruct.json'}", f"data.images={data_dir / 'images'}", "n=1"]
    assert run_command(inspect.main, [f"recipe={clip[1]}", *more]) == 0
    assert f"<image x{TOKENS}>" in capsys.readouterr().out
