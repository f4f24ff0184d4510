"""Attention in fp32 for a bf16 model on a CPU that multiplies bf16 in large products alone.

oneDNN multiplies bf16 fast wherever AVX512-BF16 is. The attention kernel of torch does its small products by other
routines, which are fast with AMX only: without it its backward takes twice as long in bf16 as in fp32
(`tests/bench/cpu_attention.py`). All else stays in bf16, and the result is the more exact one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "vlmpeft_fp32"  # under which transformers' attention modules find it


def attention_in_fp32(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' attention functions: query (b, h, s, e), key and value (b, h, t, e) -> (b, s, h, e), no weights.

    On an accelerator, to which the model may have been moved, it is the plain one.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return out.to(query.dtype), None


def is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model of this dtype attends faster in fp32 here."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not torch.cpu.get_capabilities().get("amx_bf16")


def attend_in_fp32(language: Any) -> None:
    """Let a causal LM that attends by `sdpa` do so in fp32; one that attends otherwise stays as it is."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if language.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention_in_fp32)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        language.set_attn_implementation(NAME)
