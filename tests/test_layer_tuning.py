"""Layer tuning: exactly the weights of the named blocks, as if they were trained in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import changed, hf_llava, logits, make, our_inputs, our_vlm, randomise, state_of

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.parts import parts_of
from vlmpeft.tuners import LayerTuning, LoRA, NormTuning

KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])


@pytest.mark.parametrize("which", ["", "all", "last:0", "last:", "last:1,2", "first_last:1", "every:-1", ()])
def test_other_words_are_refused(which: Any) -> None:
    with pytest.raises(ConfigError, match=r"C102.*layers.which"):
        LayerTuning(which)


@pytest.mark.parametrize("which", ["last:3", "first_last:3,1", (0, 2), (-3,)])
def test_blocks_that_are_not_there_are_refused(which: Any) -> None:
    with pytest.raises(ConfigError, match=r"C102.*blocks 0 to 1, which the model has"):
        tune(hf_llava(), [LayerTuning(which)])


@KINDS
def test_it_trains_the_weights_of_the_named_blocks(kind: str, language_dir: Path) -> None:
    model, _ = make(kind, language_dir)
    weights = sum(p.numel() for p in parts_of(model).blocks[1].parameters())
    tuned = tune(model, [LayerTuning("last:1")])
    assert all(".layers.1." in name for name in tuned.trainable())
    assert sum(p.numel() for p in tuned.trainable().values()) == weights


@KINDS
def test_one_step_gives_what_training_the_block_in_place_gives(kind: str, language_dir: Path) -> None:
    ours, inputs = make(kind, language_dir)
    theirs, _ = make(kind, language_dir)
    tuned = tune(ours, [LayerTuning((0,))])
    theirs.requires_grad_(False)
    block = parts_of(theirs).blocks[0].requires_grad_(True)
    for model, parameters in ((ours, tuned.trainable().values()), (theirs, block.parameters())):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
        for _ in range(2):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    tuned.merge_and_unload()
    assert not changed(state_of(theirs), ours)


def test_on_a_bf16_model_it_trains_fp32_copies_and_saves_them(language_dir: Path, tmp_path: Path) -> None:
    model, inputs = our_vlm(language_dir, torch.bfloat16), our_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    before = logits(model, inputs)
    tuned = tune(model, [LayerTuning("last:1")])
    assert logits(model, inputs).equal(before)
    model(**inputs).loss.backward()
    assert {p.grad.dtype for p in tuned.trainable().values()} == {torch.float32}
    randomise(tuned.trainable())
    tuned.save(tmp_path)
    again = our_vlm(language_dir, torch.bfloat16)
    found = tune(again, [LayerTuning("last:1")])
    found.load(tmp_path)
    assert all(p.equal(tuned.trainable()[name]) for name, p in found.trainable().items())
    assert logits(again, inputs).equal(logits(model, inputs))


def test_norms_that_a_block_trains_already_are_a_conflict_and_lora_on_top_is_not(language_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"M552.*another tuner trains weights of .*layers.1.input_layernorm"):
        tune(hf_llava(), [LayerTuning("last:1"), NormTuning()])
    model, inputs = make("ours", language_dir)
    tuned = tune(model, [LayerTuning("last:1"), LoRA(2)])
    randomise(tuned.trainable())
    adapted = logits(model, inputs)
    tuned.merge()
    assert (logits(model, inputs) - adapted).abs().max() <= 1e-5
