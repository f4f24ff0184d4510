"""Layers with ranks of their own: their scales, and the way to stock peft and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_twins import assert_stock_peft_agrees
from safetensors.torch import load_file
from tiny_models import hf_llava, logits, our_vlm, randomise
from transformers import AutoModelForCausalLM

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.tuners import DoRA, LoRA
from vlmpeft.tuners.linear import AdaptedLinear
from vlmpeft.tuners.lora import lora_from_peft

RANKS = {"down_proj": 2, "q_proj": 8}


LOW_RANK = pytest.mark.parametrize("method", [LoRA, DoRA])


@LOW_RANK
def test_layers_have_ranks_and_scales_of_their_own(method: Any) -> None:
    for alpha, scales in ((None, {2.0}), (8.0, {8 / 2, 8 / 8, 8 / 4})):
        model = hf_llava()
        tune(model, [method(4, alpha, ranks=RANKS)])
        layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
        assert {name: len(m.lora_A.weight) for name, m in layers.items()} == {
            name: RANKS.get(name.rsplit(".", 1)[-1], 4) for name in layers
        }
        assert {m.scale for m in layers.values()} == scales


@pytest.mark.parametrize(
    "tuner",
    [
        LoRA(4, ranks=RANKS),
        LoRA(4, 6.0, ranks=RANKS),
        LoRA(4, ranks=RANKS, init="pissa", rslora=True),
        LoRA(4, ranks=RANKS, layers="last:1"),
        DoRA(4, ranks=RANKS),
        DoRA(4, 6.0, ranks=RANKS, rslora=True),
    ],
)
def test_ranks_go_to_stock_peft_and_back(tuner: Any, language_dir: Path, tmp_path: Path) -> None:
    assert_stock_peft_agrees(tuner, language_dir, tmp_path)
    folder = tmp_path / "VLM" / "adapters" / "it"
    ranks = {
        k.rsplit(".", 3)[-3]: t.shape[0]
        for k, t in load_file(folder / "adapter_model.safetensors").items()
        if "lora_A" in k
    }
    double = 2 if getattr(tuner, "init", "default") == "pissa" else 1
    assert (ranks["down_proj"], ranks["q_proj"], ranks["v_proj"]) == (2 * double, 8 * double, 4 * double)


@pytest.mark.parametrize("alphas", [{}, {"down_proj": 4, "q_proj": 16}])
@pytest.mark.parametrize("dora", [False, True])
def test_a_folder_of_peft_with_ranks_loads_here(dora: bool, alphas: Any, language_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(language_dir)
    config = LoraConfig(
        r=4, lora_alpha=8, use_dora=dora, rank_pattern=RANKS, alpha_pattern=alphas, target_modules="all-linear"
    )
    theirs = get_peft_model(base, config).eval()
    randomise({n: p for n, p in theirs.named_parameters() if "lora_" in n})
    theirs.save_pretrained(tmp_path)
    alpha = None if alphas else 8.0
    tuner = DoRA(4, alpha, ranks=RANKS) if dora else lora_from_peft(tmp_path)
    assert (tuner.r, tuner.alpha, tuner.ranks) == (4, alpha, RANKS)
    model, ids = our_vlm(language_dir), {"input_ids": torch.arange(10, 30).view(2, 10)}
    tune(model, [tuner]).load(tmp_path)
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank_pattern": {"0.q_proj": 8, "1.q_proj": 2}}, "several values for layers called 'q_proj'"),
        ({"alpha_pattern": {"down_proj": 3.0}}, "neither one alpha for all layers nor twice their ranks"),
        ({"alpha_pattern": {"v_proj": 16.0}}, "neither one alpha for all layers nor twice their ranks"),
    ],
)
def test_patterns_that_no_tuner_has_are_refused(changes: Any, told: str, tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": RANKS, "target_modules": "all-linear"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | changes))
    with pytest.raises(ModelError, match=rf"M554.*{told}"):
        lora_from_peft(tmp_path)


@LOW_RANK
def test_a_folder_of_other_ranks_is_refused(method: Any, language_dir: Path, tmp_path: Path) -> None:
    tuned = tune(our_vlm(language_dir), {"it": method(4, 4.0, ranks=RANKS)})
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    config = tmp_path / "adapters" / "it" / "adapter_config.json"
    with pytest.raises(ModelError, match=r"M554.*rank_pattern"):
        tune(our_vlm(language_dir), {"it": method(4, 4.0)}).load(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*rank_pattern"):
        tune(our_vlm(language_dir), {"it": method(4, 4.0, ranks={"q_proj": 8})}).load(tmp_path)
    values = json.loads(config.read_text())
    values["alpha_pattern"] = dict.fromkeys(values["rank_pattern"], 2.0)
    config.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"M502.*alpha_pattern"):
        tuned.load(tmp_path)


@LOW_RANK
def test_ranks_for_layers_that_are_no_targets_are_refused(method: Any) -> None:
    with pytest.raises(ModelError, match=rf"M550.*{method.kind}.ranks names 'down_prj'.*did you mean 'down_proj'"):
        tune(hf_llava(), [method(4, ranks={"down_prj": 2})])
    with pytest.raises(ModelError, match=r"M550.*not among the targets"):
        tune(hf_llava(), [method(4, targets="minimal", ranks={"down_proj": 2})])
    for ranks in ({"q_proj": 0}, {"q_proj": 1.5}):
        with pytest.raises(ConfigError, match=rf"C102.*{method.kind}.ranks"):
            method(4, ranks=ranks)
