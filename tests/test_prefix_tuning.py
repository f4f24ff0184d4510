"""Prefix tuning against peft: the same keys and values give the same logits, gradients and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, write_family
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import hf_inputs, hf_llava, our_vlm, randomise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners import LoRA, PrefixTuning
from vlmpeft.tuners.deep_prefix import DeepPrefix
from vlmpeft.tuners.prefix_tuning import fold, prefix_from_peft

N, HIDDEN = 5, 16
IDS = {"input_ids": torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 0, 0]])}
IDS["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
IDS["labels"] = IDS["input_ids"].masked_fill(IDS["attention_mask"] == 0, -100)
REAL = IDS["attention_mask"].bool()


def causal_lm(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def pair(base: Any, directory: Path, hidden: int | None) -> tuple[Any, Any, Any, DeepPrefix]:
    """peft's model and ours on copies of one base, with equal non-zero prefixes."""
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=hidden is not None, encoder_hidden_size=hidden
    )
    theirs = get_peft_model(causal_lm(directory) if base is None else base(), config)
    model = our_vlm(directory) if base is None else base()
    tuned = tune(model, [PrefixTuning(N, hidden)])
    (module,) = [m for m in model.modules() if isinstance(m, DeepPrefix)]
    copy_weights(theirs.prompt_encoder["default"], module.prefix)
    return theirs, model, tuned, module


@torch.no_grad()
def copy_weights(encoder: Any, prefix: Any) -> None:
    if not encoder.prefix_projection:
        prefix.prompt_embeddings.copy_(encoder.embedding.weight)
        return
    prefix.embedding.copy_(encoder.embedding.weight)
    prefix.down.load_state_dict(encoder.transform[0].state_dict())
    blocks = len(prefix.up)
    last = encoder.transform[2]
    for layer, weight, bias in zip(prefix.up, last.weight.chunk(blocks), last.bias.chunk(blocks), strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})


def gradients(encoder: Any, prefix: Any) -> list[tuple[Tensor, Tensor]]:
    """peft's and ours."""
    if not encoder.prefix_projection:
        return [(encoder.embedding.weight.grad, prefix.prompt_embeddings.grad)]
    up = [torch.cat([getattr(layer, name).grad for layer in prefix.up]) for name in ("weight", "bias")]
    last = encoder.transform[2]
    return [
        (encoder.embedding.weight.grad, prefix.embedding.grad),
        (encoder.transform[0].weight.grad, prefix.down.weight.grad),
        (last.weight.grad, up[0]), (last.bias.grad, up[1]),
    ]  # fmt: skip


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_matches_peft_logits_and_gradients_on_our_model(hidden: int | None, language_dir: Path) -> None:
    theirs, model, _, module = pair(None, language_dir, hidden)
    expected = theirs(**IDS)
    found = model(**{k: v for k, v in IDS.items() if k != "labels"}).logits
    torch.testing.assert_close(found[REAL], expected.logits[REAL], rtol=1e-5, atol=1e-5)
    loss = model(**IDS).loss
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    for other, mine in gradients(theirs.prompt_encoder["default"], module.prefix):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_matches_peft_logits_gradients_and_generation_on_llava(hidden: int | None, language_dir: Path) -> None:
    theirs, model, _, module = pair(hf_llava, language_dir, hidden)
    inputs = hf_inputs() | {"attention_mask": torch.ones(1, 8, dtype=torch.long)}
    expected, found = theirs(**inputs), model(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    (found.loss + expected.loss).backward()
    for other, mine in gradients(theirs.prompt_encoder["default"], module.prefix):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    del inputs["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(**inputs, **options).equal(greedy(theirs.eval(), inputs, 6))


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor], steps: int) -> Tensor:
    """Generation by whole forwards: peft's own, on transformers 5.24, leaves the prefix out."""
    ids = inputs["input_ids"]
    for _ in range(steps):
        given = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, model(**given).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_peft_in_every_family(family: str, tmp_path: Path) -> None:
    theirs, model, _, _ = pair(None, write_family(family, tmp_path), None)
    with torch.no_grad():
        expected = theirs(input_ids=IDS["input_ids"][:1]).logits
        found = model(input_ids=IDS["input_ids"][:1]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_trains_as_many_parameters_as_the_paper_says(hidden: int | None, language_dir: Path) -> None:
    trained = tune(our_vlm(language_dir), [PrefixTuning(N, hidden)]).trainable()
    width, blocks = 2 * 8, 2  # two key heads of 8, two blocks
    plain = 2 * blocks * N * width
    projected = N * width + (width + 1) * HIDDEN + (HIDDEN + 1) * 2 * blocks * width
    assert sum(p.numel() for p in trained.values()) == (plain if hidden is None else projected)


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_peft_loads_our_folder_and_we_load_pefts(hidden: int | None, language_dir: Path, tmp_path: Path) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, [PrefixTuning(N, hidden)])
    randomise(tuned.trainable())
    if hidden:
        fold(tuned)
    tuned.save(tmp_path / "ours")
    folder = tmp_path / "ours" / "adapters" / "prefix_tuning"
    theirs = PeftModel.from_pretrained(causal_lm(language_dir), folder)
    text = {k: v for k, v in IDS.items() if k != "labels"}
    with torch.no_grad():
        expected = model(**text).logits[REAL]
        torch.testing.assert_close(theirs(**text).logits[REAL], expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    other = our_vlm(language_dir)
    tune(other, [prefix_from_peft(tmp_path / "theirs")]).load(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(other(**text).logits[REAL], expected)


def test_folding_keeps_the_outputs_and_what_trains(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    tuned = tune(model, [PrefixTuning(N, HIDDEN), LoRA(2)])
    randomise(tuned.trainable())
    before = model(**IDS).logits
    fold(tuned)
    torch.testing.assert_close(model(**IDS).logits, before, rtol=1e-6, atol=1e-6)
    names = {k for k in tuned.trainable() if "prefix" in k}
    assert names == {k for k, p in model.named_parameters() if p.requires_grad and "prefix" in k}
    assert names == {"language.prefix_tuning.prefix.prompt_embeddings"}
    fold(tuned)  # a second time is no second time
    assert model(**IDS).logits.shape == before.shape
    with pytest.raises(ModelError, match="M568"):
        fold(tuned, "lora")


def test_a_folder_of_another_length_or_method_is_refused(language_dir: Path, tmp_path: Path) -> None:
    tune(our_vlm(language_dir), [PrefixTuning(N, None)]).save(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*num_virtual_tokens=5.*has 4"):
        tune(our_vlm(language_dir), [PrefixTuning(4, None)]).load(tmp_path)
    tune(our_vlm(language_dir), [LoRA(2)]).save(tmp_path / "lora")
    with pytest.raises(ModelError, match=r"M554.*LORA"):
        tune(our_vlm(language_dir), [PrefixTuning(N, None)]).load(tmp_path / "lora" / "adapters" / "lora")


class Block(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.embedding = nn.ModuleList([Block()]), nn.Embedding(3, 4)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return inputs_embeds


def test_models_that_cannot_carry_a_prefix_are_refused(tmp_path: Path) -> None:
    import transformers

    language: Any = Decoder()
    language.config = transformers.LlamaConfig(hidden_size=4, num_attention_heads=1)
    parts = Parts(language, language, language, language, list(language.layers), 0)
    with pytest.raises(ModelError, match=r"M567.*no self-attention with a KV cache in a Block"):
        tune(language, [PrefixTuning()], parts)
    bloom = transformers.BloomConfig(vocab_size=300, hidden_size=8, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(bloom).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"M567.*computes positions itself"):
        tune(our_vlm(tmp_path), [PrefixTuning()])


def test_a_static_cache_gives_what_a_growing_one_gives() -> None:
    model: Any = hf_llava()
    randomise(tune(model, [PrefixTuning(N, HIDDEN)]).trainable())
    prompt = {k: v for k, v in hf_inputs().items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    static = model.generate(**prompt, **options, cache_implementation="static", disable_compile=True)
    assert static.equal(model.generate(**prompt, **options))
