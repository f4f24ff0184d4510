"""UniPELT: every gate in its place by the formula, whatever computes attention, with caches and padding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_ID, hf_inputs, hf_llava, logits, make, our_vlm, randomise
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.parts import Parts, parts_of
from vlmpeft.tuners import PromptTuning, UniPELT
from vlmpeft.tuners.unipelt import GatedBottleneck, GatedLoRA, GatedPrefix, parameter_count

N = 3
TUNER = UniPELT(r=4, tokens=N, hidden=None, dim=6)
FIXED = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [99]}


def tuned_llava(*more: Any) -> tuple[Any, GatedPrefix]:
    """Gates, prefix and all away from their start, by enough to be seen."""
    model = hf_llava()
    torch.manual_seed(0)
    randomise(tune(model, [TUNER, *more]).trainable(), scale=0.5)
    (prefix,) = [m for m in model.modules() if isinstance(m, GatedPrefix)]
    return model, prefix


def gate(layer: nn.Linear, x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-(x @ layer.weight.T + layer.bias)))


def lora(layer: Any, x: Tensor) -> Tensor:
    if not isinstance(layer, GatedLoRA):
        out: Tensor = layer(x)
        return out
    update = x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    return layer.base_layer(x) + layer.scale * gate(layer.gate, x) * update


def written_out(block: Any, prefix: GatedPrefix, number: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """A block with all three gates, from the formulas: keys and values of the prefix by query."""
    attention, x = block.self_attn, block.input_layernorm(hidden)
    heads = [lora(layer, x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (attention.q_proj, attention.k_proj)]
    q, k = apply_rotary_pos_emb(*heads, *rotary)
    v = lora(attention.v_proj, x).unflatten(-1, (-1, 8)).transpose(1, 2)
    keys, values = prefix.prefix.keys_values(number)  # (h, n, e)
    g = gate(prefix.gates[number], x)  # type: ignore[arg-type]
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        own = head // (q.shape[1] // k.shape[1])
        for t in range(q.shape[2]):
            seen_keys = torch.cat([g[0, t] * keys[own], k[0, own, : t + 1]])
            seen_values = torch.cat([g[0, t] * values[own], v[0, own, : t + 1]])
            weights = torch.softmax(seen_keys @ q[0, head, t] * 8**-0.5, 0)
            out[0, head, t] = weights @ seen_values
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
    y = block.post_attention_layernorm(hidden)
    adapter = block.mlp
    assert isinstance(adapter, GatedBottleneck)
    given = adapter.base_layer(y)
    update = torch.relu(given @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    return hidden + given + gate(adapter.gate, y) * update


@pytest.mark.parametrize("prompts", [0, 2])
def test_logits_and_gradients_are_those_of_the_formulas(prompts: int) -> None:
    """Prompt tuning on top puts its tokens between the prefix and the text, and every gate sees them."""
    model, prefix = tuned_llava(*([PromptTuning(prompts)] if prompts else []))
    decoder, ids = model.model.language_model, torch.tensor([[5, 6, 7, 8, 9]])
    size = prompts + 5
    rotary = decoder.rotary_emb(torch.zeros(1, size, 32), torch.arange(N, N + size)[None])
    hidden = decoder.embed_tokens(ids)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if prompts:
        (own,) = [p for name, p in parameters.items() if "prompt_tuning" in name]
        assert own.shape == (prompts, 32)
        hidden = torch.cat([own[None], hidden], 1)
    for number, block in enumerate(decoder.layers):
        hidden = written_out(block, prefix, number, hidden, rotary)
    expected = model.lm_head(decoder.norm(hidden))[:, prompts:]
    found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    gradients = [torch.autograd.grad((out * weights).sum(), list(parameters.values())) for out in (found, expected)]
    for name, mine, other in zip(parameters, *gradients, strict=True):
        assert mine.abs().max() > 0, name
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_prefix_behind_closed_gates_is_nothing_but_keys_of_zeros() -> None:
    """As in the paper, where gates scale keys and values: what is left takes its share of attention."""
    model, prefix = tuned_llava()
    with torch.no_grad():
        for layer in prefix.gates:
            layer.bias.fill_(-1e4)  # type: ignore[operator,union-attr]
    closed = logits(model, hf_inputs())
    with torch.no_grad():
        prefix.prefix.prompt_embeddings.zero_()  # type: ignore[operator,union-attr]
    torch.testing.assert_close(logits(model, hf_inputs()), closed)


def test_it_trains_as_many_numbers_as_the_paper_says(language_dir: Path) -> None:
    roberta = {"blocks": 12, "d": 768, "r": 8, "linears": 2, "tokens": 10, "hidden": 512, "dim": 768 // 16}
    assert parameter_count(**roberta) == 11_083_376  # the paper's table 6
    assert parameter_count(**roberta) + 10 * roberta["d"] == 11_091_056  # ten prompts on top
    model = our_vlm(language_dir)
    count = sum(p.numel() for p in tune(model, [UniPELT(targets=("q_proj", "o_proj"), hidden=7)]).trainable().values())
    shared = 10 * 16 + 16 * 7 + 2 * (7 * 2 * 16 + 2 * 16)  # two heads share keys, which are 16 numbers less wide than d
    assert count == parameter_count(2, 32, 8, 2, 10, 7, 2) - shared


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_of_any_implementation_gives_the_same(implementation: str) -> None:
    model, _ = tuned_llava()
    expected = logits(model, hf_inputs())
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(logits(model, hf_inputs()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [(), (PromptTuning(2),)], ids=["alone", "with prompts"])
def test_cached_generation_of_a_padded_batch_is_that_of_whole_forwards(more: Any) -> None:
    model, _ = tuned_llava(*more)
    ids = torch.cat([hf_inputs()["input_ids"], torch.tensor([[0, 0, 7, *[IMAGE_ID] * 4, 30]])])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    prompt = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8)}
    cached = model.generate(**prompt, **FIXED)
    assert model.generate(**prompt, **FIXED, use_cache=False).equal(cached)
    alone = {"input_ids": ids[1:, 2:], "attention_mask": mask[1:, 2:], "pixel_values": prompt["pixel_values"][1:]}
    assert model.generate(**alone, **FIXED)[0].equal(cached[1, 2:])
    for _ in range(5):
        token = logits(model, prompt)[:, -1:, :IMAGE_ID].argmax(-1)
        prompt["input_ids"] = torch.cat([prompt["input_ids"], token], 1)
        prompt["attention_mask"] = torch.cat([prompt["attention_mask"], torch.ones_like(token)], 1)
    assert prompt["input_ids"].equal(cached)


@pytest.mark.parametrize("kind", ["ours", "hf"])
def test_it_goes_without_a_trace_and_a_copy_has_its_own(kind: str, language_dir: Path) -> None:
    model, given = make(kind, language_dir)
    attention = parts_of(model).blocks[0].self_attn
    config = attention.config
    tuned = tune(model, [TUNER])
    randomise(tuned.trainable())
    adapted, twin = logits(model, given), copy.deepcopy(model)
    assert attention.config is not config
    tuned.remove()
    assert attention.config is config
    assert not attention._forward_pre_hooks
    assert logits(twin, given).equal(adapted)


def test_what_cannot_be_done_is_said(language_dir: Path) -> None:
    tuned = tune(our_vlm(language_dir), [TUNER])
    with pytest.raises(ModelError, match=r"M556.*cannot be merged"):
        tuned.merge()

    class Own(nn.Module):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None) -> Tensor:
            return hidden_states

    model = hf_llava()
    model.model.language_model.layers[0].self_attn = Own()
    parts: Parts = parts_of(model)
    with pytest.raises(ModelError, match=r"M567.*Own computes attention by itself"):
        tune(model, [UniPELT(targets=("o_proj",))], parts)
    for options in ({"r": 0}, {"tokens": 0}, {"hidden": 0}, {"dim": 0}, {"part": "vision"}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=r"C102.*unipelt"):
            UniPELT(**options)
