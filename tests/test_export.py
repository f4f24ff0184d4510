"""Models that leave the house: transformers, peft and LLaVA's layout read them, and they answer as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native import SIZE, TOKENS, logits_of, make_native, native_bundle, native_directory
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlmpeft
from vlmpeft import export
from vlmpeft.build import Bundle
from vlmpeft.errors import ModelError, run_command
from vlmpeft.hf_llava import export_hf
from vlmpeft.layouts import Exchange, parse_question
from vlmpeft.llava_layout import EMBEDDINGS, read_llava, with_rows

KINDS = ("clip", "siglip")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved native model of each encoder."""
    return {kind: native_directory(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def exported(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of them written by the command with to=hf."""
    out = {kind: tmp_path_factory.mktemp("out") / kind for kind in KINDS}
    for kind in KINDS:
        assert run_command(export.main, [f"model={directories[kind]}", "to=hf", f"out={out[kind]}"]) == 0
    return out


def opened(directory: Path) -> tuple[Any, dict[str, Any]]:
    load: Any = LlavaForConditionalGeneration.from_pretrained
    model, info = load(directory, output_loading_info=True)
    return model.eval(), info


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_every_tensor_and_gives_our_logits(
    directories: dict[str, Path], exported: dict[str, Path], kind: str
) -> None:
    model, info = opened(exported[kind])
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ours = logits_of(vlmpeft.load(directories[kind], device="cpu").model)
    theirs = logits_of(model, model.config.image_token_id)
    assert (theirs[:, : ours.shape[1]] - ours).abs().max() <= 1e-5
    assert ours.std() > 0.1
    assert model.config.vision_feature_select_strategy == {"clip": "default", "siglip": "full"}[kind]
    assert model.config.image_seq_length == TOKENS


def test_the_file_has_the_names_that_transformers_itself_writes_for_hub_models(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    """A model loaded from the hub's layout is saved in it again."""
    for kind in KINDS:
        model, _ = opened(exported[kind])
        model.save_pretrained(tmp_path / kind)
        ours = load_file(exported[kind] / "model.safetensors")
        theirs = load_file(tmp_path / kind / "model.safetensors")
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_it_back_gives_our_tensors_bit_for_bit(
    directories: dict[str, Path], exported: dict[str, Path], kind: str
) -> None:
    bundle = vlmpeft.load(directories[kind], device="cpu")
    rows = bundle.model.language.get_input_embeddings().weight.shape[0]
    bundle.tuned.merge()
    expected = bundle.tuned.plain_state()
    found = read_llava(exported[kind], rows)
    padded = load_file(exported[kind] / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert found[EMBEDDINGS].shape[0] == rows < padded.shape[0]
    for name, tensor in expected.items():
        name = name.replace("vision.backbone.", "vision.")
        if name != "language.lm_head.weight":  # tied: the file holds it once
            assert torch.equal(found[name], tensor), name
    complete = {name for name in found if not name.startswith("vision.")} | {"language.lm_head.weight"}
    assert complete == {name for name in expected if not name.startswith("vision.")}


def test_new_rows_of_the_vocabulary_are_the_mean_and_ids_fit(
    directories: dict[str, Path], exported: dict[str, Path]
) -> None:
    model, _ = opened(exported["clip"])
    processor: Any = AutoProcessor.from_pretrained(exported["clip"])
    weight = model.get_input_embeddings().weight
    own = len(vlmpeft.load(directories["clip"], device="cpu").tokenizer)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == own
    assert weight.shape[0] % 64 == 0
    assert model.config.text_config.vocab_size == weight.shape[0] >= len(processor.tokenizer)
    torch.testing.assert_close(weight[own:], weight[:own].mean(0).expand(len(weight) - own, -1))
    assert torch.equal(with_rows(weight, len(weight)), weight)


@pytest.mark.parametrize("template", ["chatml", "vicuna_v1", "tokenizer"])
def test_its_chat_template_gives_the_ids_we_train_on(tmp_path: Path, template: str) -> None:
    bundle = native_bundle(make_native(tmp_path), f"stages.instruct.template={template}")
    export_hf(bundle, tmp_path / "out")
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    image, picture = {"type": "image"}, Image.new("RGB", (40, 30), "red")
    turns = [("What is shown?", "A red square"), ("Is it blue?", "No"), ("Why?", None)]
    for count in (
        (1,) if template == "vicuna_v1" else (1, 2, 3)
    ):  # its answers begin inside a word: " A" is " ", "A" here
        asked = [*turns[: count - 1], (turns[count - 1][0], None)]
        messages: list[dict[str, Any]] = []
        for i, (question, answer) in enumerate(asked):
            text = [{"type": "text", "text": question}]
            content: Any = [image, *text] if i == 0 else text
            if template == "tokenizer":
                content = "<image>\n" + question if i == 0 else question
            messages += [{"role": "user", "content": content}]
            messages += [{"role": "assistant", "content": answer}] if answer else []
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        found = processor(text=prompt, images=picture)["input_ids"][0]
        first = parse_question("<image>\n" + asked[0][0])
        exchanges = [Exchange(first if i == 0 else (q,), a) for i, (q, a) in enumerate(asked)]
        expected = bundle.turn_encoder().encode(exchanges).input_ids
        image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        assert list(found) == [image_id if i < 0 else i for i in expected]


def test_it_answers_what_we_answer(directories: dict[str, Path], exported: dict[str, Path]) -> None:
    picture = Image.effect_noise((50, 34), 90).convert("RGB")
    for kind in KINDS:
        model, _ = opened(exported[kind])
        processor: Any = AutoProcessor.from_pretrained(exported[kind], use_fast=False)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        bundle = vlmpeft.load(directories[kind], device="cpu")
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() == bundle.generate(
            picture, "What is shown?", max_new_tokens=6
        )


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_its_processor_sees_our_pixels(tmp_path: Path, mode: str) -> None:
    from transformers import LlavaImageProcessorPil

    bundle = native_bundle(make_native(tmp_path), f"data.image_mode={mode}")
    export_hf(bundle, tmp_path / "out")
    rounding = 1 / 255 / min(bundle.image_transform.std)  # one step of an 8-bit value
    default: Any = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    pillow: Any = LlavaImageProcessorPil.from_pretrained(tmp_path / "out")
    for i, size in enumerate([(48, 20), (20, 48), (33, 57), (SIZE, SIZE), (90, 31)]):
        picture = Image.effect_noise(size, 90).convert("RGB").rotate(10 * i, fillcolor=(200, 30, 10))
        (ours,) = bundle.image_transform(picture)  # one view
        theirs = default(picture, return_tensors="pt")["pixel_values"][0]
        assert theirs.shape == ours.shape
        assert (theirs - ours).abs().max() <= rounding + 1e-5
        exact = torch.as_tensor(pillow(picture, return_tensors="np")["pixel_values"][0])
        torch.testing.assert_close(exact, ours, rtol=0, atol=1e-5)


def test_stock_peft_loads_adapter_and_projector_on_the_exported_base(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    for kind in KINDS:
        base, adapter = tmp_path / f"{kind}-base", tmp_path / f"{kind}-adapter"
        model = f"model={directories[kind]}"
        assert run_command(export.main, [model, "to=hf", "merge=false", f"out={base}"]) == 0
        assert run_command(export.main, [model, "to=peft", f"base={base}", f"out={adapter}"]) == 0
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
        assert config["modules_to_save"] == ["multi_modal_projector"]
        loaded, _ = opened(base)
        image_id = loaded.config.image_token_id
        loaded.model.multi_modal_projector.linear_1.weight.data.zero_()  # so that it must come from the adapter
        peft: Any = PeftModel.from_pretrained(loaded, adapter).eval()
        ours = logits_of(vlmpeft.load(directories[kind], device="cpu").model)
        theirs = logits_of(peft, image_id)[:, : ours.shape[1]]
        assert (theirs - ours).abs().max() <= 1e-5
        adapted = {name for name, _ in peft.named_parameters() if "lora_" in name}
        assert {name.split(".")[3] for name in adapted} == {"language_model"}  # never the tower, whose names are alike
        saved = load_file(adapter / "adapter_model.safetensors")
        peft.save_pretrained(tmp_path / f"{kind}-again")
        assert load_file(tmp_path / f"{kind}-again" / "adapter_model.safetensors").keys() == saved.keys()


PROJECTORS = {"linear": ("linear", "llava_llama"), "mlp3x_gelu": ("mlp3x_gelu", "llava_llama")}
PROJECTORS |= {"ldp": ("ldpnet", "mobilevlm"), "ldpv2": ("ldpnetv2", "mobilevlm")}


@pytest.mark.parametrize("projector", PROJECTORS)
def test_llavas_layout_holds_every_tensor_under_its_name(tmp_path: Path, projector: str) -> None:
    directory = native_directory(tmp_path, "clip", f"projector.name={projector}")
    out = tmp_path / "out"
    assert run_command(export.main, [f"model={directory}", "to=llava", f"out={out}"]) == 0
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    bundle = vlmpeft.load(directory, device="cpu")
    assert (config["mm_projector_type"], config["model_type"]) == PROJECTORS[projector]
    assert config["mm_vision_select_layer"] == -2
    assert config["mm_vision_select_feature"] == "patch"
    assert config["image_aspect_ratio"] == "pad"
    assert config["mm_hidden_size"] == 16
    for name, tensor in bundle.model.projector.state_dict().items():
        assert torch.equal(tensors[f"model.mm_projector.{name}"], tensor)
    bundle.tuned.merge_and_unload()
    assert torch.equal(
        tensors["model.layers.0.mlp.up_proj.weight"],
        bundle.model.language.state_dict()["model.layers.0.mlp.up_proj.weight"],
    )
    tower = load_file(tmp_path / "tower" / "model.safetensors")
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert {k.removeprefix(prefix): v.sum() for k, v in tensors.items() if k.startswith(prefix)} == {
        k: v.sum() for k, v in tower.items()
    }
    back = read_llava(out)
    assert {name.split(".")[0] for name in back} == {"vision", "projector", "language"}
    assert all(torch.equal(back[f"projector.{k}"], v) for k, v in bundle.model.projector.state_dict().items())
    assert len(back) == len(tensors)


def test_a_directory_without_a_projector_is_no_llava(tmp_path: Path, language_dir: Path) -> None:
    with pytest.raises(ModelError, match="M571"):
        read_llava(language_dir)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_tower_and_an_untied_head_are_written_too(tmp_path: Path, kind: str) -> None:
    recipe = make_native(tmp_path, kind, tied=False)
    extra = "tuners.seeing={kind: lora, part: vision, r: 2}", "tuners.head={kind: full, part: lm_head}"
    bundle: Bundle = native_bundle(recipe, *(f"stages.instruct.{text}" for text in extra))
    bundle.tuned.merge_and_unload()
    expected = logits_of(bundle.model)
    export_hf(bundle, tmp_path / "out")
    model, info = opened(tmp_path / "out")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (logits_of(model, model.config.image_token_id)[:, : expected.shape[1]] - expected).abs().max() <= 1e-5
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_half_precision_is_written_in_half(directories: dict[str, Path], tmp_path: Path) -> None:
    arguments = [f"model={directories['clip']}", "to=hf", "dtype=bf16", f"out={tmp_path / 'out'}"]
    assert run_command(export.main, arguments) == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    model, info = opened(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]


def test_a_directory_in_use_is_left_alone(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert run_command(export.main, [f"model={directories['clip']}", "to=hf", f"out={tmp_path}"]) == 2
    assert "error[C112]" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep"
