"""Adapters go to stock peft and come back; a file that does not fit is refused and nothing of it applied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import changed, hf_inputs, hf_llava, our_inputs, our_vlm, randomise, state_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.tune import Tuned
from vlmpeft.tuners import Full, LoRA
from vlmpeft.tuners.lora import lora_from_peft

ADAPTER = "adapters/lora/adapter_model.safetensors"
CONFIG = "adapters/lora/adapter_config.json"


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("tuner", [LoRA(4, 6.0), LoRA(4, 6.0, rslora=True, targets="minimal")])
def test_an_adapter_of_ours_loads_in_stock_peft_on_the_bare_causal_lm(
    tuner: LoRA, language_dir: Path, tmp_path: Path
) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, [tuner])
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    bare = AutoModelForCausalLM.from_pretrained(language_dir).eval()
    theirs = PeftModel.from_pretrained(bare, tmp_path / "adapters" / "lora").eval()
    ids = {"input_ids": torch.arange(10, 30).view(2, 10)}
    assert (logits(theirs, ids) - logits(model, ids)).abs().max() <= 1e-5
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == str(language_dir)
    model.language = theirs.merge_and_unload()  # and in the VLM itself, with images
    with_images = logits(model, our_inputs())
    model.language = AutoModelForCausalLM.from_pretrained(language_dir).eval()
    again = tune(model, [tuner])
    again.load(tmp_path)
    assert (with_images - logits(model, our_inputs())).abs().max() <= 1e-5


@pytest.mark.parametrize("targets", ["all-linear", "minimal"])
def test_an_adapter_of_ours_loads_in_stock_peft_on_a_whole_hugging_face_vlm(targets: str, tmp_path: Path) -> None:
    model = hf_llava()
    tuned = tune(model, [LoRA(4, targets=targets)])
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    theirs = PeftModel.from_pretrained(hf_llava(), tmp_path / "adapters" / "lora").eval()
    assert (logits(theirs, hf_inputs()) - logits(model, hf_inputs())).abs().max() <= 1e-5
    assert not [n for n, _ in theirs.named_parameters() if "lora_" in n and "vision_tower" in n]


@pytest.mark.parametrize("part", ["vision", "projector"])
def test_an_adapter_on_another_part_loads_in_stock_peft_on_that_part(part: str, tmp_path: Path) -> None:
    model = hf_llava()
    tuned = tune(model, {"lora": LoRA(4, part=part)})
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    twin = hf_llava()
    name = {"vision": "vision_tower", "projector": "multi_modal_projector"}[part]
    loaded = PeftModel.from_pretrained(getattr(twin.model, name), tmp_path / "adapters" / "lora").eval()
    setattr(twin.model, name, loaded.merge_and_unload())
    assert (logits(twin, hf_inputs()) - logits(model, hf_inputs())).abs().max() <= 1e-5


def peft_adapter(model: nn.Module, folder: Path, targets: Any) -> PeftModel:
    """A peft model with random adapters, saved in `folder`."""
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, use_rslora=True, target_modules=targets)
    theirs = get_peft_model(model, config).eval()
    randomise({n: p for n, p in theirs.named_parameters() if "lora_" in n})
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_an_adapter_of_peft_on_a_causal_lm_loads_here(targets: Any, language_dir: Path, tmp_path: Path) -> None:
    theirs = peft_adapter(AutoModelForCausalLM.from_pretrained(language_dir), tmp_path, targets)
    model = our_vlm(language_dir)
    tuner = lora_from_peft(tmp_path)
    assert (tuner.r, tuner.numerator, tuner.dropout, tuner.rslora) == (3, 7.0, 0.1, True)
    tune(model, [tuner]).load(tmp_path)
    ids = {"input_ids": torch.arange(10, 30).view(2, 10)}
    assert (logits(theirs, ids) - logits(model, ids)).abs().max() <= 1e-5


def test_an_adapter_of_peft_on_a_whole_hugging_face_vlm_loads_here(tmp_path: Path) -> None:
    theirs = peft_adapter(hf_llava(), tmp_path, r".*language_model.*\.(q_proj|v_proj)")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(ModelError, match="M554"):
        lora_from_peft(tmp_path)  # a pattern is not a list of names
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}))
    model = hf_llava()
    tune(model, [lora_from_peft(tmp_path)]).load(tmp_path)
    assert (logits(theirs, hf_inputs()) - logits(model, hf_inputs())).abs().max() <= 1e-5


def test_an_adapter_that_also_sits_in_the_vision_tower_is_refused(tmp_path: Path) -> None:
    peft_adapter(hf_llava(), tmp_path, ["q_proj", "v_proj"])  # by suffix peft wraps CLIP's layers too
    model = hf_llava()
    tuned = tune(model, [lora_from_peft(tmp_path)])
    before = state_of(model)
    with pytest.raises(ModelError, match=r"M502.*vision_tower"):
        tuned.load(tmp_path)
    assert not changed(before, model)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 3}},
        {"lora_bias": True}, {"peft_type": "LOHA"}, {"target_modules": ".*proj"},
    ],
)  # fmt: skip
def test_settings_of_peft_that_lora_here_does_not_have_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, **change}))
    with pytest.raises(ModelError, match="M554"):
        lora_from_peft(tmp_path)


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{", '{"peft_type": "LORA"}', '{"r": "x", "lora_alpha": 1}', "[" * 9999]
)
def test_a_damaged_adapter_config_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="M502"):
        lora_from_peft(tmp_path)


def edit_tensors(change: Callable[[dict[str, Tensor]], None], file: str = ADAPTER) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return edit


def edit_config(**change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return edit


def last(tensors: dict[str, Tensor]) -> str:
    return max(tensors)


def poke(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[last(tensors)].flatten()[-1] = value

    return change


DAMAGES = {
    "missing": ("M502", edit_tensors(lambda t: t.pop(last(t)))),
    "extra": ("M502", edit_tensors(lambda t: t.update(more=torch.zeros(1)))),
    "misshapen": ("M502", edit_tensors(lambda t: t.update({last(t): t[last(t)][:-1].clone()}))),
    "transposed": ("M502", edit_tensors(lambda t: t.update({last(t): t[last(t)].T.contiguous()}))),
    "integers": ("M502", edit_tensors(lambda t: t.update({last(t): t[last(t)].int()}))),
    "nan": ("M503", edit_tensors(poke(float("nan")))),
    "infinite": ("M503", edit_tensors(poke(float("inf")))),
    "too large for fp32": ("M503", edit_tensors(lambda t: t.update({last(t): t[last(t)].double() + 1e300}))),
    "cut": ("M502", lambda d: (d / ADAPTER).write_bytes((d / ADAPTER).read_bytes()[:-9])),
    "empty": ("M502", lambda d: (d / ADAPTER).write_bytes(b"")),
    "no file": ("M502", lambda d: (d / ADAPTER).unlink()),
    "another alpha": ("M502", edit_config(lora_alpha=99)),
    "another rank": ("M502", edit_config(r=8)),
    "rslora": ("M502", edit_config(use_rslora=True)),
    "dora": ("M554", edit_config(use_dora=True)),
    "no config": ("M502", lambda d: (d / CONFIG).unlink()),
    "one adapter more": ("M502", lambda d: (d / "adapters/second").mkdir()),
    "another name": ("M502", lambda d: (d / "adapters/lora").rename(d / "adapters/lara")),
    "no projector": ("M502", lambda d: (d / "projector.safetensors").unlink()),
    "nan in the projector": ("M503", edit_tensors(poke(float("nan")), "projector.safetensors")),
    "projector lacks": ("M502", edit_tensors(lambda t: t.pop(last(t)), "projector.safetensors")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("merged", [False, True])
def test_what_does_not_fit_is_refused_and_nothing_of_it_applied(
    damage: str, merged: bool, language_dir: Path, tmp_path: Path
) -> None:
    code, edit = DAMAGES[damage]
    tuners = {"lora": LoRA(4), "projector": Full()}
    source = tune(our_vlm(language_dir), tuners)
    randomise(source.trainable(), seed=1)
    source.save(tmp_path)
    edit(tmp_path)
    tuned = tune(our_vlm(language_dir), tuners)
    randomise(tuned.trainable(), seed=2)
    if merged:
        tuned.merge()
    before = state_of(tuned.model)
    with pytest.raises(ModelError) as caught:
        tuned.load(tmp_path)
    assert caught.value.code == code
    assert not changed(before, tuned.model)


def test_a_saved_projector_comes_back_where_nothing_tunes_it(language_dir: Path, tmp_path: Path) -> None:
    source = tune(our_vlm(language_dir), {"lora": LoRA(4), "projector": Full()})
    randomise(source.trainable(), 1)
    source.save(tmp_path)
    tuned = tune(our_vlm(language_dir), {"lora": LoRA(4)})
    tuned.load(tmp_path)
    saved, found = source.parts.projector.state_dict(), tuned.parts.projector.state_dict()
    assert all(torch.equal(saved[name], found[name]) for name in saved)


def test_a_file_with_a_part_that_nobody_tunes_here_is_refused(language_dir: Path, tmp_path: Path) -> None:
    tune(our_vlm(language_dir), {"lora": LoRA(4), "vision": Full("vision")}).save(tmp_path)
    tuned = tune(our_vlm(language_dir), {"lora": LoRA(4)})
    with pytest.raises(ModelError, match=r"M502.*unknown tensor 'vision"):
        tuned.load(tmp_path)


def test_save_and_load_bring_every_tuned_tensor_back_merged_or_not(language_dir: Path, tmp_path: Path) -> None:
    def tuned(seed: int) -> Tuned:
        made = tune(our_vlm(language_dir), {"lora": LoRA(4), "language": Full("language"), "projector": Full()})
        randomise(made.trainable(), seed)
        return made

    source, target = tuned(1), tuned(2)
    plain = state_of(source.model)
    source.merge()
    source.save(tmp_path)
    assert source._adapters()[0].merged_from is not None
    target.merge()
    target.load(tmp_path)
    assert torch.equal(logits(source.model, our_inputs()), logits(target.model, our_inputs()))
    target.unmerge()
    assert not changed(plain, target.model)


def test_bf16_adapters_of_others_load_into_fp32_ones(language_dir: Path, tmp_path: Path) -> None:
    tuners = {"lora": LoRA(4)}
    source = tune(our_vlm(language_dir), tuners)
    source.save(tmp_path)
    edit_tensors(lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))(tmp_path)
    tuned = tune(our_vlm(language_dir), tuners)
    tuned.load(tmp_path)
    assert {p.dtype for p in tuned.trainable().values()} == {torch.float32}
