"""Finding the anatomy of a model, and counting by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import IMAGE_ID, hf_llava, our_vlm
from torch import nn

from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, adapter_root, parameter_table, parts_by_name, parts_of, path_of, table_text


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
    with pytest.raises(ModelError, match="M532"):
        parts_of(other)


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
