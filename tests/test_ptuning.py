"""P-tuning v2 against its closed form: transformers with a filled KV cache and longer embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import our_inputs, our_vlm
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from vlmpeft import tune
from vlmpeft.tuners import PTuningV2

N, M, BLOCKS, HEADS, WIDTH = 3, 2, 2, 2, 8  # of the tiny Llama: two blocks, two key heads of 8


def expected_logits(language: Any, prefix: Tensor, prompts: Tensor, embeddings: Tensor) -> Tensor:
    """[prefix, prompts, sequence], written out: keys and values in the cache, prompts before the embeddings."""
    rows, size = embeddings.shape[:2]
    by_block = prefix.view(N, BLOCKS, 2, HEADS, WIDTH)
    cache = DynamicCache()
    for block in range(BLOCKS):
        keys, values = (by_block[:, block, i].transpose(0, 1).expand(rows, -1, -1, -1) for i in (0, 1))
        cache.update(keys, values, block)
    whole = torch.cat([prompts.expand(rows, -1, -1), embeddings], 1)
    positions = torch.arange(N, N + M + size)[None].expand(rows, -1)
    mask = torch.ones(rows, N + M + size, dtype=torch.long)
    out = language(inputs_embeds=whole, attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits: Tensor = out.logits[:, M:]
    return logits


def test_logits_and_gradients_are_those_of_the_closed_form(language_dir: Path) -> None:
    model, inputs = our_vlm(language_dir), our_inputs()
    tuned = tune(model, [PTuningV2(N, M)])
    trained = tuned.trainable()
    prefix = trained["language.ptuning_v2.prefix.prompt_embeddings"]
    prompts = trained["language.ptuning_v2.input_prompts"]
    torch.manual_seed(4)
    with torch.no_grad():
        prefix.copy_(torch.randn_like(prefix))
        prompts.copy_(torch.randn_like(prompts))
    del inputs["labels"]
    found = model(**inputs).logits
    mask = torch.ones_like(inputs["input_ids"]).bool()
    _, embeddings = model.embed(inputs["input_ids"], mask, None, inputs["pixel_values"])
    twins = [p.detach().clone().requires_grad_() for p in (prefix, prompts)]
    language = AutoModelForCausalLM.from_pretrained(language_dir, dtype=torch.float32).eval()
    expected = expected_logits(language, *twins, embeddings.detach())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    mine = torch.autograd.grad((found * weights).sum(), (prefix, prompts))
    theirs = torch.autograd.grad((expected * weights).sum(), twins)
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tuner", "prompts"), [(PTuningV2(N), N), (PTuningV2(N, 7), 7)])
def test_trains_a_prefix_in_every_block_and_the_prompts(tuner: PTuningV2, prompts: int, language_dir: Path) -> None:
    trained = tune(our_vlm(language_dir), [tuner]).trainable()
    assert sum(p.numel() for p in trained.values()) == 2 * BLOCKS * N * HEADS * WIDTH + prompts * 32
