"""Which layers a tuner works on: names, presets, expressions, blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tiny_models import hf_llava

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.tuners import IA3, AdaLoRA, BottleneckAdapter, DoRA, LoRA, VeRA
from vlmpeft.tuners.block_choice import which_blocks
from vlmpeft.tuners.lora_layers import LoRALinear

BELOW = "model.language_model.layers."


def adapted(model: Any, kind: type = LoRALinear) -> dict[str, Any]:
    return {name.removeprefix(BELOW): m for name, m in model.named_modules() if isinstance(m, kind)}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", list(range(8))), ("first:2", [0, 1]), ("last:1", [7]), ("first_last:2,1", [0, 1, 7]),
        ("every:3", [0, 3, 6]), ("2-4", [2, 3, 4]), ("7-7", [7]), ((3, 1, -1, 3), [1, 3, 7]),
    ],
)  # fmt: skip
def test_blocks_are_named_in_a_word(choice: Any, expected: list[int]) -> None:
    assert which_blocks(choice, 8, "x") == expected


@pytest.mark.parametrize("choice", ["5-8", "4-2", "first:9", (8,), (-9,)])
def test_blocks_that_are_not_there_are_refused(choice: Any) -> None:
    with pytest.raises(ConfigError, match=r"C102.*x=.*blocks 0 to 7, which the model has"):
        which_blocks(choice, 8, "x")


@pytest.mark.parametrize("tuner", [LoRA(2), DoRA(2), AdaLoRA(1, 2), VeRA(4), IA3(), BottleneckAdapter(4)])
def test_a_choice_of_blocks_holds_for_every_kind(tuner: Any) -> None:
    model = hf_llava()
    tuned = tune(model, [dataclasses.replace(tuner, layers="last:1")])
    assert {name.removeprefix(BELOW)[0] for name in tuned.trainable()} == {"1"}
    with pytest.raises(ConfigError, match=rf"C102.*{tuner.kind}.layers='top'.*N-M"):
        dataclasses.replace(tuner, layers="top")


def test_an_expression_matches_whole_paths_that_begin_with_the_block() -> None:
    model = hf_llava()
    tune(model, [LoRA(2, targets=r"re:1\.self_attn\.[qk]_proj|0\.mlp\..*")])
    assert set(adapted(model)) == {
        "1.self_attn.q_proj", "1.self_attn.k_proj", "0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj",
    }  # fmt: skip
    model = hf_llava()
    tune(model, [LoRA(2, targets=r"re:.*\.fc1", part="vision")])
    assert {name.rsplit(".", 1)[-1] for name in adapted(model)} == {"fc1"}
    with pytest.raises(ModelError, match=r"M550.*targets=re:q_proj matches no linear layer.*0.self_attn.q_proj"):
        tune(hf_llava(), [LoRA(2, targets="re:q_proj")])
    with pytest.raises(ConfigError, match=r"C102.*lora.targets.*regular expression"):
        LoRA(targets="re:(")


def test_an_expression_finds_layers_below_other_adapters() -> None:
    model = hf_llava()
    tune(model, [BottleneckAdapter(4), LoRA(2, targets=r"re:0\.mlp\.up_proj")])
    assert list(adapted(model)) == ["0.mlp.base_layer.up_proj"]


def test_half_of_a_list_that_matches_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ModelError, match=r"M550.*'vproj'.*did you mean 'v_proj'"):
        tune(hf_llava(), [LoRA(2, targets=("q_proj", "vproj"))])
