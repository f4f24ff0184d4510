"""Models for vLLM: a directory that it serves, and a LoRA beside it that keeps its rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from native import logits_of, native_directory
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import vlmpeft
from vlmpeft import export
from vlmpeft.errors import run_command

LAYER = re.compile(
    r"base_model\.model\.model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight"
)


def exported(tmp_path: Path, *overrides: str, merge: bool = False) -> tuple[Path, Path]:
    """A native model of these settings, and what the command makes of it."""
    directory, out = native_directory(tmp_path, "clip", *overrides), tmp_path / "served"
    arguments = [f"model={directory}", "to=vllm", f"out={out}", f"merge={str(merge).lower()}"]
    assert run_command(export.main, arguments) == 0
    return directory, out


def with_adapter(out: Path, adapter: Path) -> torch.Tensor:
    """Logits of stock peft on the base that lies in `out`."""
    from peft import PeftModel

    base: Any = AutoModelForImageTextToText.from_pretrained(out).eval()
    peft: Any = PeftModel.from_pretrained(base, adapter).eval()
    assert {n.split(".")[3] for n, _ in peft.named_parameters() if "lora_" in n} == {"language_model"}
    return logits_of(peft, base.config.image_token_id)


@pytest.mark.parametrize(
    ("overrides", "r"),
    [
        ([], 4),
        (["lora.rslora=true", "lora.alpha=9"], 4),
        (["lora.ranks={down_proj: 6, q_proj: 2}"], 6),
        (["lora.init=pissa"], 8),
        (["lora.targets=minimal", "tuners.tower={kind: full, part: vision}"], 4),
    ],
)
def test_base_and_adapter_together_give_our_logits(tmp_path: Path, overrides: list[str], r: int) -> None:
    directory, out = exported(tmp_path, *[f"stages.instruct.{o}" for o in overrides])
    adapter = out / "adapters" / "lora"
    ours = logits_of(vlmpeft.load(directory, device="cpu").model)
    assert (with_adapter(out, adapter)[:, : ours.shape[1]] - ours).abs().max() <= 1e-5
    base: Any = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert (logits_of(base, base.config.image_token_id)[:, : ours.shape[1]] - ours).abs().max() > 1e-2
    config, tensors = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert {t.shape[0 if ".lora_A." in name else 1] for name, t in tensors.items()} == {r}
    assert (config["r"], config["lora_alpha"], config["bias"]) == (r, r, "none")
    refused = ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")
    assert not any(config.get(key) for key in refused)  # vLLM refuses the first two, and older ones overlook the next
    assert all(LAYER.fullmatch(name) for name in tensors)  # "expected target modules in .. but received .." otherwise


def test_without_an_adapter_there_is_none_to_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out = exported(tmp_path, "stages.instruct.lora=null")
    assert capsys.readouterr().out.splitlines()[-1] == f"serve it: vllm serve {out}"
    assert not (out / "adapters").exists()


def test_merged_it_is_one_model_with_our_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, out = exported(tmp_path, "stages.instruct.lora.kind=dora", merge=True)
    assert capsys.readouterr().out.splitlines()[-1] == f"serve it: vllm serve {out}"
    base: Any = AutoModelForImageTextToText.from_pretrained(out).eval()
    ours = logits_of(vlmpeft.load(directory, device="cpu").model)
    assert (logits_of(base, base.config.image_token_id)[:, : ours.shape[1]] - ours).abs().max() <= 1e-5
    assert not (out / "adapters").exists()


@pytest.mark.parametrize(("r", "limit"), [(4, 8), (16, 16), (17, 32)])
def test_the_command_it_prints_allows_the_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], r: int, limit: int
) -> None:
    _, out = exported(tmp_path, f"stages.instruct.lora.r={r}")
    said = capsys.readouterr().out.splitlines()[-1]
    lora = f"--enable-lora --max-lora-rank {limit} --lora-modules lora={out}/adapters/lora"
    assert said == f"serve it: vllm serve {out} {lora}"


def test_the_language_model_is_named_as_vllm_looks_it_up(tmp_path: Path) -> None:
    _, out = exported(tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["lora.where=visual"], "tuner 'lora' (lora on language where=visual) has no form in an adapter that vLLM"),
        (["lora.kind=dora"], "tuner 'lora' (dora on language) has no form in an adapter that vLLM"),
        (["lora.part=vision"], "tuner 'lora' (lora on vision) has no form in an adapter that vLLM"),
        (["tuners.norm={kind: norm}"], "tuner 'norm' (norm on language) has no form in an adapter that vLLM"),
        (["lora.r=513"], "rank 513 has no form in an adapter that vLLM serves (at most 512)"),
    ],
)
def test_what_vllm_takes_as_no_adapter_is_refused_and_says_to_merge(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: list[str], says: str
) -> None:
    directory = native_directory(tmp_path, "clip", *[f"stages.instruct.{c}" for c in changes])
    capfd.readouterr()
    out = tmp_path / "out"
    assert run_command(export.main, [f"model={directory}", "to=vllm", "merge=false", f"out={out}"]) == 4
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlmpeft:")]
    assert f"error[M570] {says}" in line
    assert line.endswith("Fix: fold everything into the weights with merge=true.")
    assert not out.exists()
