"""The schedule against transformers', and the partition of what trains into groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import hf_llava, our_vlm
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from vlmpeft import tune
from vlmpeft.optim import adamw, lr_factor, parameter_groups, set_lr
from vlmpeft.tuners import Full, LoRA

THEIRS = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}


@pytest.mark.parametrize("total", [1, 2, 7, 33, 100, 333])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_equals_transformers_at_every_step(schedule: str, warmup: float, total: int) -> None:
    steps = int(-(-total * warmup // 1))  # ceil, as TrainingArguments.get_warmup_steps
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = (
        get_constant_schedule_with_warmup(optimizer, steps)
        if schedule == "constant"
        else THEIRS[schedule](optimizer, steps, total)
    )
    for step in range(total + 1):
        ours = lr_factor(step, total, warmup, schedule)  # type: ignore[arg-type]
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("total", [10, 100, 5198])
def test_starts_at_zero_peaks_after_the_warmup_and_ends_at_zero(total: int) -> None:
    peak = -(-3 * total // 100)
    factors = [lr_factor(step, total, 0.03, "cosine") for step in range(total + 1)]
    assert factors[0] == 0.0
    assert factors[peak] == max(factors) == 1.0
    assert factors[total] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["ours", "hf"])
def test_groups_partition_what_trains_and_keep_ten_to_one(kind: str, language_dir: Path) -> None:
    model = our_vlm(language_dir) if kind == "ours" else hf_llava()
    tuned = tune(model, {"lora": LoRA(2, lr=2e-4), "projector": Full(lr=2e-5)})
    groups = parameter_groups(tuned, 1.0, 0.1)
    inside = [id(p) for group in groups for p in group["params"]]
    assert sorted(inside) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = [name for group in groups for name in group["parameter_names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    optimizer = adamw(groups, (0.9, 0.999), 1e-8)
    for step in range(1, 100):
        lrs = set_lr(optimizer, lr_factor(step, 100, 0.03, "cosine"))
        assert lrs["lora"] / lrs["projector"] == pytest.approx(10)
        assert {group["name"]: group["lr"] for group in optimizer.param_groups} == lrs


def test_biases_and_norms_do_not_decay(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, {"language": Full("language"), "projector": Full()})
    for group in parameter_groups(tuned, 1e-3, 0.1):
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True):
            exempt = name.endswith(".bias") or "norm" in name
            assert group["weight_decay"] == (0.0 if exempt else 0.1), name
            assert exempt is (parameter.ndim == 1)


def test_a_tuner_without_a_rate_of_its_own_takes_that_of_the_recipe(language_dir: Path) -> None:
    tuned = tune(our_vlm(language_dir), {"lora": LoRA(2), "projector": Full(lr=5e-5)})
    assert {g["name"]: g["peak_lr"] for g in parameter_groups(tuned, 3e-4, 0.0)} == {"lora": 3e-4, "projector": 5e-5}


def test_nested_parts_keep_their_own_rates(language_dir: Path) -> None:
    tuned = tune(hf_llava(), {"language": Full("language", lr=1e-4), "head": Full("lm_head", lr=1e-5)})
    by_name = {n: g["peak_lr"] for g in parameter_groups(tuned, 1.0, 0.0) for n in g["parameter_names"]}
    assert by_name["lm_head.weight"] == 1e-5
    assert by_name["model.language_model.embed_tokens.weight"] == 1e-4


def test_adamw_is_torchs_with_these_settings() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    group = {"name": "a", "peak_lr": 1e-3, "lr": 0.0, "weight_decay": 0.1, "params": [parameter], "parameter_names": []}
    optimizer = adamw([group], (0.8, 0.95), 1e-6)
    assert isinstance(optimizer, torch.optim.AdamW)
    found = optimizer.param_groups[0]
    assert (found["betas"], found["eps"], found["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.1)
