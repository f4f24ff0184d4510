"""Prompt tuning against peft: the same embeddings give the same logits, gradients and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, write_family
from peft import PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import hf_inputs, hf_llava, our_vlm, randomise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vlmpeft import tune
from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.parts import parts_of
from vlmpeft.tuners import PrefixTuning, PromptTuning
from vlmpeft.tuners.prompt import prompt_from_peft
from vlmpeft.tuners.virtual import wider

M = 5
IDS = {"input_ids": torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 0, 0]])}
IDS["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
IDS["labels"] = IDS["input_ids"].masked_fill(IDS["attention_mask"] == 0, -100)
IDS["labels"][:, 0] = -100  # in peft the last virtual token would predict it; here a virtual token predicts nothing
TEXT = {k: v for k, v in IDS.items() if k != "labels"}
REAL = IDS["attention_mask"].bool()


def causal_lm(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def pair(directory: Path) -> tuple[Any, Any, Tensor, nn.Parameter]:
    """peft's model and ours on copies of one base, and their equal prompts."""
    theirs = get_peft_model(causal_lm(directory), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=M))
    model = our_vlm(directory)
    (prompts,) = tune(model, [PromptTuning(M)]).trainable().values()
    weight = theirs.prompt_encoder["default"].embedding.weight
    prompts.data.copy_(weight.data)
    return theirs, model, weight, prompts


def test_matches_peft_logits_loss_and_gradients(language_dir: Path) -> None:
    theirs, model, weight, prompts = pair(language_dir)
    expected, loss = theirs(**IDS), model(**IDS).loss
    found = model(**TEXT).logits
    torch.testing.assert_close(found[REAL], expected.logits[:, M:][REAL], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    (loss + expected.loss).backward()
    assert weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(prompts.grad, weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_peft_in_every_family(family: str, tmp_path: Path) -> None:
    theirs, model, _, _ = pair(write_family(family, tmp_path))
    with torch.no_grad():
        expected = theirs(input_ids=IDS["input_ids"][:1]).logits[:, M:]
        found = model(input_ids=IDS["input_ids"][:1]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_on_llava_it_is_the_longer_sequence_of_embeddings() -> None:
    """Written out: prompts, text and image as embeddings of the language model alone."""
    model, inputs = hf_llava(), {k: v for k, v in hf_inputs().items() if k != "labels"}
    core = model.model
    features = core.get_image_features(inputs["pixel_values"]).pooler_output[0]
    embeddings = core.get_input_embeddings()(inputs["input_ids"]).clone()
    embeddings[0, 1:5] = features
    (prompts,) = tune(model, [PromptTuning(M)]).trainable().values()
    found = model(**inputs).logits
    twin = hf_llava()
    whole = torch.cat([prompts.detach()[None], embeddings.detach()], 1)
    expected = twin.lm_head(twin.model.language_model(inputs_embeds=whole).last_hidden_state)[:, M:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_peft_loads_our_folder_and_we_load_pefts(language_dir: Path, tmp_path: Path) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, [PromptTuning(M)])
    randomise(tuned.trainable())
    tuned.save(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(causal_lm(language_dir), tmp_path / "ours" / "adapters" / "prompt_tuning")
    with torch.no_grad():
        expected = model(**TEXT).logits[REAL]
        torch.testing.assert_close(theirs(**TEXT).logits[:, M:][REAL], expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    other = our_vlm(language_dir)
    tune(other, [prompt_from_peft(tmp_path / "theirs")]).load(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(other(**TEXT).logits[REAL], expected)
    with pytest.raises(ModelError, match=r"M502.*num_virtual_tokens=5.*has 4"):
        tune(our_vlm(language_dir), [PromptTuning(4)]).load(tmp_path / "ours")
    with pytest.raises(ModelError, match=r"M554.*PROMPT_TUNING"):
        tune(our_vlm(language_dir), [PrefixTuning(M, None)]).load(tmp_path / "theirs")


@pytest.mark.parametrize("tokens", [3, 40])  # fewer and more than the text has
def test_text_init_is_that_of_peft(tokens: int, language_dir: Path) -> None:
    text = "Answer the question about the image."
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(language_dir),
    )  # fmt: skip
    expected = get_peft_model(causal_lm(language_dir), config).prompt_encoder["default"].embedding.weight
    for name in (None, str(language_dir)):
        model = our_vlm(language_dir)
        tuned = tune(model, [PromptTuning(tokens, init="text", init_text=text, tokenizer=name)])
        (found,) = tuned.trainable().values()
        assert found.equal(expected)


def test_text_init_needs_a_tokenizer_that_is_there(language_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"M569.*give prompt_tuning.tokenizer"):
        tune(hf_llava(), [PromptTuning(init="text", init_text="a")])
    with pytest.raises(EnvironmentFault, match="E420"):
        tune(our_vlm(language_dir), [PromptTuning(init="text", init_text="a", tokenizer="none/such")])


def test_random_init_lies_among_the_token_embeddings(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    (prompts,) = tune(model, [PromptTuning(2000)]).trainable().values()
    table = parts_of(model).language.get_input_embeddings().weight  # type: ignore[operator]
    torch.testing.assert_close(prompts.mean(0), table.mean(0), rtol=0, atol=0.015)
    torch.testing.assert_close(prompts.std(0), table.std(0), rtol=0.1, atol=0)
    assert prompts.shape == (2000, 32)


def test_a_cache_of_fixed_size_is_refused() -> None:
    model: Any = hf_llava()
    tune(model, [PromptTuning(M)])
    prompt = {k: v for k, v in hf_inputs().items() if k != "labels"}
    with pytest.raises(ModelError, match=r"M567.*cache that grows"):
        model.generate(**prompt, max_new_tokens=2, cache_implementation="static", disable_compile=True)


def test_a_mask_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ModelError, match=r"M567.*attention=sdpa"):
        wider(object(), 2)
    by_kind = wider({"full_attention": torch.zeros(1, 1, 2, 2), "sliding_attention": None}, 1)
    assert by_kind["full_attention"].shape == (1, 1, 2, 3)
    assert by_kind["sliding_attention"] is None
