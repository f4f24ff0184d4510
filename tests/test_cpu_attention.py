"""Attention in fp32 inside a bf16 model: nothing else changes, and no token sees what it must not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor

from vlmpeft.cpu_attention import NAME, attend_in_fp32, attention_in_fp32, is_faster
from vlmpeft.routing import turn_mask

CPU = torch.device("cpu")


def llama(dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).eval().to(dtype)


def masks() -> dict[str, Tensor | None]:
    left, right = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    left[0, :3], right[1, 6:] = 0, 0
    turns = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2)
    return {"none": None, "left": left, "right": right, "turns": turn_mask(right.bool(), turns, torch.float32)}


@pytest.mark.parametrize("kind", masks())
@torch.no_grad()
def test_an_fp32_model_gives_the_logits_it_gave_under_every_mask(kind: str) -> None:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    plain, ours = llama(), llama()
    attend_in_fp32(ours)
    assert ours.config._attn_implementation == NAME
    mask = masks()[kind]
    assert torch.equal(ours(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


def test_it_generates_what_it_generated_with_padding_and_a_cache() -> None:
    ids, mask = torch.arange(14).view(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    plain, ours = llama(), llama()
    attend_in_fp32(ours)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_queries_are_rounded_once_forward_and_backward(autocast: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, weights = attention_in_fp32(SimpleNamespace(is_causal=True), q, k, v, None)
    out.float().square().sum().backward()
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    rounded = expected.bfloat16()
    rounded.float().square().sum().backward()
    assert weights is None
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rounded, rtol=0, atol=0)
    for ours, theirs in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.bfloat16(), rtol=0, atol=0)


@torch.no_grad()
def test_the_rest_of_a_bf16_model_stays_in_bf16_and_its_logits_stay_near() -> None:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    exact = llama()(ids).logits
    ours = llama(torch.bfloat16)
    attend_in_fp32(ours)
    logits = ours(ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.02)


def test_a_model_that_attends_otherwise_is_left_alone() -> None:
    model = llama(attention="eager")
    attend_in_fp32(model)
    assert model.config._attn_implementation == "eager"


def test_the_name_is_not_written_into_a_saved_model(tmp_path: Path) -> None:
    model = llama()
    attend_in_fp32(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert T.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_it_is_for_bf16_on_a_cpu_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    assert is_faster(torch.bfloat16, CPU)
    assert not is_faster(torch.float32, CPU)
    assert not is_faster(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    assert not is_faster(torch.bfloat16, CPU)
