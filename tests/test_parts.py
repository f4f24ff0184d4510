"""Finding the anatomy of a model, and counting by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_hf import MODELS
from tiny_models import IMAGE_ID, hf_llava, our_vlm
from torch import nn

from vlmpeft import tune
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.errors import ModelError
from vlmpeft.parts import PARTS, Parts, adapter_root, parameter_table, parts_by_name, parts_of, path_of, table_text
from vlmpeft.tuners import Full, LoRA


def test_finds_the_parts_of_a_hugging_face_llava() -> None:
    model = hf_llava()
    parts = parts_of(model)
    assert parts.vision is model.model.vision_tower
    assert parts.projector is model.model.multi_modal_projector
    assert parts.language is model.model.language_model
    assert parts.lm_head is model.lm_head
    assert list(parts.blocks) == list(model.model.language_model.layers)
    assert parts.image_token_id == IMAGE_ID
    assert adapter_root(model, parts) is model


LLAVA = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
IDEFICS = ("model.vision_model", "model.connector", "model.text_model", "lm_head")
QWEN = ("model.visual", "model.visual.merger", "model.language_model", "lm_head")
PLACES = {
    **dict.fromkeys(MODELS, LLAVA),
    **dict.fromkeys(("idefics 3", "smolvlm"), IDEFICS),
    **dict.fromkeys(("qwen2-vl", "qwen2.5-vl", "qwen3-vl"), QWEN),
    "blip-2": ("vision_model", "language_projection", "language_model", "language_model.lm_head"),
}
LEFT_OVER = {"llava next": "model.image_newline", "llava onevision": "model.image_newline", "blip-2": "query_tokens"}


@pytest.mark.parametrize("kind", MODELS)
def test_finds_the_parts_of_hugging_face_vlms(kind: str) -> None:
    model = MODELS[kind]()
    parts = parts_of(model)
    assert tuple(path_of(model, parts.get(part)) for part in PARTS) == PLACES[kind]
    assert parts.lm_head is model.get_output_embeddings()
    assert len(parts.blocks) == 2
    assert parts.image_token_id == model.config.image_token_id == 60


@pytest.mark.parametrize("kind", MODELS)
def test_tuning_them_trains_the_projector_and_adapters_in_the_language_model_alone(kind: str) -> None:
    model = MODELS[kind]()
    total = sum(p.numel() for p in model.parameters())
    tuned = tune(model, [LoRA(r=2), Full("projector")])
    _, projector, language, _ = PLACES[kind]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        f"{projector}.{name}" for name, _ in tuned.parts.projector.named_parameters()
    }
    assert {name.startswith(f"{language}.") for name in trained if "lora_" in name} == {True}
    rows = {row["part"]: row for row in tuned.table()}
    assert sum(row["total"] for row in rows.values()) == total  # tied tensors once
    assert rows["vision"]["trainable"] == 0
    assert ("other" in rows) is (kind in LEFT_OVER)
    if kind in LEFT_OVER:
        assert parts_by_name(model, tuned.parts)[LEFT_OVER[kind]] == "other"
        assert rows["other"]["trainable"] == 0


def test_a_model_of_ours_describes_itself(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    parts = parts_of(model)
    assert (parts.vision, parts.projector, parts.language) == (model.vision, model.projector, model.language)
    assert parts.image_token_id == IMAGE_TOKEN_ID
    assert adapter_root(model, parts) is model.language


@pytest.mark.parametrize("lost", ["vision_tower", "multi_modal_projector", "language_model"])
def test_an_unknown_layout_is_refused_with_what_is_missing(lost: str) -> None:
    model = hf_llava()
    delattr(model.model, lost)
    what = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language"}[lost]
    with pytest.raises(ModelError, match=f"M532.*cannot find {what} in a LlavaForConditionalGeneration"):
        parts_of(model)


def test_a_model_without_blocks_or_with_some_other_attribute_parts_is_refused() -> None:
    model = hf_llava()
    model.model.language_model.layers = None
    with pytest.raises(ModelError, match=r"M532.*decoder blocks"):
        parts_of(model)
    other = nn.Linear(2, 2)
    other.parts = "wheels"  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"M532.*find vision, projector, language, lm_head, image_token_id in a Lin"):
        parts_of(other)


def test_a_vlm_without_a_head_or_an_image_token_is_refused() -> None:
    headless = hf_llava()
    del headless.lm_head
    with pytest.raises(ModelError, match=r"M532.*cannot find lm_head in a LlavaForConditionalGeneration"):
        parts_of(headless)
    model = MODELS["blip-2"]()
    model.config.image_token_index = None
    with pytest.raises(ModelError, match=r"M532.*cannot find image_token_id in a Blip2ForConditionalGeneration"):
        parts_of(model)


def test_an_empty_projector_is_a_projector() -> None:
    model = hf_llava()
    model.model.multi_modal_projector = nn.Sequential()  # false in a boolean context
    assert isinstance(parts_of(model).projector, nn.Sequential)


def test_every_parameter_has_one_part_and_the_innermost_wins(language_dir: Path) -> None:
    model = hf_llava()
    model.image_newline = nn.Parameter(model.lm_head.weight[0].detach().clone())
    by_name = parts_by_name(model, parts_of(model))
    assert set(by_name) == {name for name, _ in model.named_parameters()}
    assert by_name["image_newline"] == "other"
    assert by_name["lm_head.weight"] == "lm_head"
    assert {part for name, part in by_name.items() if "vision_tower" in name} == {"vision"}
    nested = our_vlm(language_dir)
    nested.language.lm_head = nn.Linear(32, 5)  # untied, inside the language model
    assert parts_by_name(nested, parts_of(nested))["language.lm_head.weight"] == "lm_head"


def test_unknown_parts_and_foreign_modules_are_refused() -> None:
    model = hf_llava()
    with pytest.raises(ModelError, match=r"M530.*did you mean 'projector'"):
        parts_of(model).get("projektor")
    with pytest.raises(ModelError, match="M531"):
        path_of(model, nn.Linear(1, 1))


def test_the_table_leaves_added_parameters_out_of_the_total() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(n, 1, bias=False) for n in (1, 10, 100, 1000))

    model = Small().requires_grad_(False)
    model.c.weight.requires_grad_(True)
    parts = Parts(model.a, model.b, model.c, model.d, [], -1)
    rows = parameter_table(model, parts, {"c.weight": "lora"}, {"c.weight"})
    assert rows[2] == {"part": "language", "tuners": ["lora"], "trainable": 100, "total": 0}
    assert [row["total"] for row in rows] == [1, 10, 0, 1000]


def test_shares_are_cut_so_that_only_all_of_it_reads_100() -> None:
    rows = [{"part": "language", "tuners": ["full"], "trainable": 99_999, "total": 100_000}]
    text = table_text("instruct", rows)
    assert text.splitlines()[0] == "instruct: trainable parameters"
    assert " 99.99%" in text
    assert "100.00%" not in text
    assert "100.00%" in table_text("s", [{**rows[0], "trainable": 100_000}])
    assert "LLM" not in text  # a head of its own would add the sum of the two
