"""Which layers a tuner works on: names, presets, expressions, blocks; and ranks of their own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft_twins import assert_stock_peft_agrees
from safetensors.torch import load_file
from tiny_models import hf_llava, our_vlm, randomise

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


RANKS = {"down_proj": 2, "q_proj": 8}


def test_layers_have_ranks_and_scales_of_their_own() -> None:
    for alpha, scales in ((None, {2.0}), (8.0, {8 / 2, 8 / 8, 8 / 4})):
        model = hf_llava()
        tune(model, [LoRA(4, alpha, ranks=RANKS)])
        layers = adapted(model)
        assert {name: len(m.lora_A.weight) for name, m in layers.items()} == {
            name: RANKS.get(name.rsplit(".", 1)[-1], 4) for name in layers
        }
        assert {m.scale for m in layers.values()} == scales


@pytest.mark.parametrize("options", [{}, {"alpha": 6.0}, {"init": "pissa", "rslora": True}, {"layers": "last:1"}])
def test_ranks_go_to_stock_peft_and_back(options: Any, language_dir: Path, tmp_path: Path) -> None:
    tuner = LoRA(4, ranks=RANKS, **options)
    assert_stock_peft_agrees(tuner, language_dir, tmp_path)
    folder = tmp_path / "VLM" / "adapters" / "it"
    ranks = {
        k.rsplit(".", 3)[-3]: t.shape[0]
        for k, t in load_file(folder / "adapter_model.safetensors").items()
        if "lora_A" in k
    }
    double = 2 if options.get("init") else 1
    assert (ranks["down_proj"], ranks["q_proj"], ranks["v_proj"]) == (2 * double, 8 * double, 4 * double)


def test_a_folder_of_other_ranks_is_refused(language_dir: Path, tmp_path: Path) -> None:
    tuned = tune(our_vlm(language_dir), {"it": LoRA(4, 4.0, ranks=RANKS)})
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    config = tmp_path / "adapters" / "it" / "adapter_config.json"
    with pytest.raises(ModelError, match=r"M554.*rank_pattern"):
        tune(our_vlm(language_dir), {"it": LoRA(4, 4.0)}).load(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*rank_pattern"):
        tune(our_vlm(language_dir), {"it": LoRA(4, 4.0, ranks={"q_proj": 8})}).load(tmp_path)
    values = json.loads(config.read_text())
    values["alpha_pattern"] = dict.fromkeys(values["rank_pattern"], 2.0)
    config.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"M502.*alpha_pattern"):
        tuned.load(tmp_path)


def test_ranks_for_layers_that_are_no_targets_are_refused() -> None:
    with pytest.raises(ModelError, match=r"M550.*lora.ranks names 'down_prj'.*did you mean 'down_proj'"):
        tune(hf_llava(), [LoRA(4, ranks={"down_prj": 2})])
    with pytest.raises(ModelError, match=r"M550.*not among the targets"):
        tune(hf_llava(), [LoRA(4, targets="minimal", ranks={"down_proj": 2})])
    for ranks in ({"q_proj": 0}, {"q_proj": 1.5}):
        with pytest.raises(ConfigError, match=r"C102.*lora.ranks"):
            LoRA(4, ranks=ranks)  # type: ignore[arg-type]
