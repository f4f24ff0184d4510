"""IA3 against peft: the same vectors give the same outputs and gradients, and one folder serves both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model, inject_adapter_in_model
from tiny_models import changed, hf_inputs, hf_llava, logits, make, our_vlm, randomise, state_of
from torch import nn
from transformers import AutoModelForCausalLM

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.optim import parameter_groups
from vlmpeft.tuners import IA3, LoRA
from vlmpeft.tuners.ia3 import IA3Linear

D_IN, D_OUT = 24, 40


KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])


def base_linear(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feedforward", [False, True])
def test_matches_peft_outputs_gradients_and_merged_weights(feedforward: bool, dtype: torch.dtype) -> None:
    ours = IA3Linear(base_linear(dtype), feedforward)
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    theirs = inject_adapter_in_model(config, nn.Sequential(base_linear(dtype)))[0]
    randomise({"l": ours.ia3_l})
    theirs.ia3_l["default"].data = ours.ia3_l.detach().clone()
    results = []
    for layer, vector in ((ours, ours.ia3_l), (theirs, theirs.ia3_l["default"])):
        torch.manual_seed(2)
        x = torch.randn(2, 5, D_IN).to(dtype).requires_grad_(True)
        out = layer(x)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append([out, *torch.autograd.grad((out.float() * weights).sum(), (x, vector))])
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item())
    ours.merge()
    theirs.merge()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # in bf16 the two round in another order
    assert torch.allclose(ours.base_layer.weight, theirs.base_layer.weight, atol=tolerance)
    assert torch.allclose(ours.base_layer.bias, theirs.base_layer.bias, atol=tolerance)


@KINDS
def test_what_it_trains_is_what_the_formula_says(kind: str, language_dir: Path) -> None:
    model, _ = make(kind, language_dir)
    tuned = tune(model, [IA3()])
    width = 64 if kind == "ours" else 48
    assert sum(p.numel() for p in tuned.trainable().values()) == 2 * (16 + 16 + width)  # blocks * (k + v + ffn)


def test_weight_decay_does_not_pull_the_vectors_to_zero() -> None:
    groups = parameter_groups(tune(hf_llava(), [IA3()]), 1e-4, 0.1)
    assert [(g["weight_decay"], g["peak_lr"], len(g["params"])) for g in groups] == [(0.0, 3e-3, 6)]


def test_on_llama_3_2_1b_it_trains_147456() -> None:
    blocks = nn.ModuleList(
        nn.ModuleDict(
            {"k_proj": nn.Linear(2048, 512), "v_proj": nn.Linear(2048, 512), "down_proj": nn.Linear(8192, 2048)}
        )
        for _ in range(16)
    ).to("meta")
    model = hf_llava()
    model.model.language_model.layers = blocks
    assert sum(p.numel() for p in tune(model, [IA3()]).trainable().values()) == 147_456


def test_a_bias_is_merged_and_comes_back(language_dir: Path) -> None:
    model, inputs = make("hf", language_dir)
    tuned = tune(model, [IA3(("q_proj", "fc2"), ("fc2",), part="vision")])
    randomise(tuned.trainable())
    state, adapted = state_of(model), logits(model, inputs)
    tuned.merge()
    assert (logits(model, inputs) - adapted).abs().max() <= 1e-5
    tuned.unmerge()
    assert not changed(state, model)
    tuned.merge_and_unload()
    assert (logits(model, inputs) - adapted).abs().max() <= 1e-5


@pytest.mark.parametrize("order", [("ia3", "lora"), ("lora", "ia3")])
def test_with_lora_on_the_same_layers_it_merges_in_the_order_it_acts(order: tuple[str, str]) -> None:
    model, inputs = hf_llava(), hf_inputs()
    base = state_of(model)
    every = {"ia3": IA3(), "lora": LoRA(2)}
    tuned = tune(model, {name: every[name] for name in order})
    randomise(tuned.trainable())
    state, adapted = state_of(model), logits(model, inputs)
    tuned.merge()
    assert (logits(model, inputs) - adapted).abs().max() <= 1e-5
    tuned.unmerge()
    assert not changed(state, model)
    tuned.merge()
    tuned.remove()
    assert not changed(base, model)


def test_pefts_folder_loads_here(language_dir: Path, tmp_path: Path) -> None:
    names = ["k_proj", "v_proj", "down_proj"]
    config = IA3Config(target_modules=names, feedforward_modules=["down_proj"])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(language_dir), config).eval()
    randomise({n: p for n, p in theirs.named_parameters() if "ia3_" in n})
    theirs.save_pretrained(tmp_path)
    model = our_vlm(language_dir)
    tune(model, [IA3()]).load(tmp_path)
    ids = {"input_ids": torch.arange(10, 30).view(2, 10)}
    assert (logits(theirs, ids) - logits(model, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"peft_type": "LORA"}, "M554"), ({"feedforward_modules": ".*down.*"}, "M554"),
        ({"fan_in_fan_out": True}, "M554"), ({"feedforward_modules": []}, "M502"),
    ],
)  # fmt: skip
def test_a_folder_that_means_something_else_is_refused(
    change: dict[str, Any], code: str, language_dir: Path, tmp_path: Path
) -> None:
    tuned = tune(our_vlm(language_dir), [IA3()])
    tuned.save(tmp_path)
    file = tmp_path / "adapters" / "ia3" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=code):
        tuned.load(tmp_path)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"ia3.feedforward=\('fc2',\).*among ia3.targets"):
        IA3(feedforward=("fc2",))
    with pytest.raises(ConfigError, match=r"ia3.where"):
        IA3(where="visual", part="vision")
    with pytest.raises(ConfigError, match=r"ia3.lr"):
        IA3(lr=2.0)
    with pytest.raises(ModelError, match=r"M550.*k_prj.*did you mean 'k_proj'"):
        tune(hf_llava(), [IA3(("k_prj",), ())])
