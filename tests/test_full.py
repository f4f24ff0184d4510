"""Full tuning of a part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import hf_llava, our_vlm

from vlmpeft import tune
from vlmpeft.tuners import Full, LoRA


@pytest.mark.parametrize("part", ["projector", "vision", "lm_head", "language"])
def test_brings_exactly_its_part_to_fp32_with_the_same_values(part: str, language_dir: Path) -> None:
    model = hf_llava().bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = tune(model, [Full(part)]).trainable()
    assert trained
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
        assert parameter.requires_grad is (name in trained)
        assert torch.equal(parameter.to(torch.bfloat16), before[name])


def test_small_updates_of_a_bf16_model_are_not_lost(language_dir: Path) -> None:
    model = our_vlm(language_dir, torch.bfloat16)
    weight = next(iter(tune(model, [Full("projector")]).trainable().values()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(2e-5 * before)  # far below a bf16 step, 0.4 %
    assert not torch.equal(weight, before)


def test_a_tied_head_is_trained_once(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    head = tune(model, [Full("lm_head")]).trainable()
    assert list(head) == ["language.model.embed_tokens.weight"]
    assert next(iter(head.values())) is model.language.lm_head.weight


def test_adapters_in_the_part_are_not_its_own(language_dir: Path) -> None:
    tuned = tune(our_vlm(language_dir), {"lora": LoRA(2), "language": Full("language")})
    claims = tuned.claims()
    assert all("lora_" in name for name in claims["lora"])
    assert not any("lora_" in name for name in claims["language"])
