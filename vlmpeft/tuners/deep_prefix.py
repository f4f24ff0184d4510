"""Trained keys and values that every query of every block sees before those of the sequence.

Letters: b batch, s queries, t keys of the sequence, n virtual tokens, l blocks, h key heads, e head width, w = h e.

They are put in where a block's self-attention hands its own keys and values to the KV cache, and the mask gets n
columns in front. So they are in no cache, bear no rotary position (as in `peft`), and meet any attention implementation
that reads a cache. Every call of a block makes them from the parameters, so that recomputed activations cannot mix up
two forwards. In a sliding-window layer they stay visible.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.routed import cache_name
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.virtual import VirtualTokens, decoder_with, wider

STD = 0.02  # of a prefix's start without MLP, as the weights of most language models; peft's 1.0 drowns the sequence


class PlainPrefix(nn.Module):
    """Keys and values as parameters, laid out as in peft's file: (n, 2 l h e), keys before values of each block."""

    def __init__(self, tokens: int, blocks: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.tokens, self.blocks, self.heads = tokens, blocks, heads
        self.prompt_embeddings = nn.Parameter(torch.randn(tokens, 2 * blocks * heads * head_width) * STD)

    def keys_values(self, block: int) -> Tensor:
        """(2, h, n, e) of a block."""
        chosen = self.prompt_embeddings.unflatten(1, (self.blocks, -1))[:, block]
        return _by_head(chosen, self.heads)


class ProjectedPrefix(nn.Module):
    """Keys and values out of an MLP, which makes them easier to train (arXiv:2101.00190, section 4.3).

    embedding (n, w), W1 (w, k), tanh, W2 (k, 2 w) of each block; together peft's PrefixEncoder with prefix_projection,
    initialised as there. Args: hidden: k.
    """

    def __init__(self, tokens: int, blocks: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.tokens, self.blocks, self.heads, width = tokens, blocks, heads, heads * head_width
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.down = nn.Linear(width, hidden)
        self.up = nn.ModuleList(nn.Linear(hidden, 2 * width) for _ in range(blocks))

    def keys_values(self, block: int) -> Tensor:
        """(2, h, n, e) of a block."""
        return _by_head(self._flat(block), self.heads)

    def _flat(self, block: int) -> Tensor:
        """(n, 2 w) of a block."""
        flat: Tensor = self.up[block](torch.tanh(self.down(self.embedding)))
        return flat

    @torch.no_grad()
    def folded(self) -> PlainPrefix:
        """The same keys and values without the MLP."""
        found = torch.cat([self._flat(block) for block in range(self.blocks)], 1)
        plain = PlainPrefix(self.tokens, self.blocks, self.heads, self.embedding.shape[1] // self.heads)
        plain.prompt_embeddings = nn.Parameter(found)
        return plain


def _by_head(flat: Tensor, heads: int) -> Tensor:
    """(n, 2 h e) -> (2, h, n, e)."""
    return flat.unflatten(1, (2, heads, -1)).permute(1, 2, 0, 3)


class DeepPrefix(VirtualTokens):
    """A prefix at work in every block of a model.

    Args: prefix: the keys and values. Raises: ModelError M567 if a block has no self-attention that reads a KV cache.
    """

    def __init__(self, prefix: PlainPrefix | ProjectedPrefix, parts: Parts) -> None:
        attentions = [self_attention(block) for block in parts.blocks]
        super().__init__(decoder_with(parts))
        self.prefix = prefix
        self._hooks = [
            attention.register_forward_pre_hook(partial(self._inject, number, cache), with_kwargs=True)
            for number, (attention, cache) in enumerate(attentions)
        ]

    @property
    def deep(self) -> int:
        """See `VirtualTokens.deep`."""
        return self.prefix.tokens

    def _inject(self, block: int, cache: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give a self-attention a cache that puts the prefix in front, and a mask that lets it be seen."""
        if not self.enabled:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        size = hidden.shape[1]
        mask, causal = kwargs.get("attention_mask"), False
        if mask is None and size > 1 and not _is_flash(module):
            causal = True  # no mask means a causal one, aligned with the first key
            mask = torch.ones(size, size, dtype=torch.bool, device=hidden.device).tril()[None, None]
        behind = PrefixCache(kwargs.get(cache), self.prefix.keys_values(block), size if causal else None)
        return args, kwargs | {cache: behind, "attention_mask": wider(mask, self.deep)}

    def fold(self) -> None:
        """Drop the MLP: what is trained from now on is the keys and values themselves, where they are."""
        if isinstance(self.prefix, ProjectedPrefix):
            trains = self.prefix.embedding.requires_grad
            self.prefix = self.prefix.folded().requires_grad_(trains)

    def take_out(self, model: nn.Module, path: str) -> None:
        """See `Attachment.take_out`."""
        for hook in self._hooks:
            hook.remove()
        super().take_out(model, path)


class PrefixCache:
    """What an attention sees of a KV cache with a prefix in front; the cache itself holds the sequence alone.

    Args: cache: or None; prefix: (2, h, n, e); visible: keys of the sequence that any query sees, None for all.
    """

    def __init__(self, cache: Any, prefix: Tensor, visible: int | None) -> None:
        self.cache, self.prefix, self.visible = cache, prefix, visible

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, n + t, e) of prefix, past and present. Args: those of the present, (b, h, s, e)."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        first, second = self.prefix
        return self._joined(first, keys), self._joined(second, values)

    def _joined(self, prefix: Tensor, own: Tensor) -> Tensor:
        if (prefix.shape[0], prefix.shape[2]) != (own.shape[1], own.shape[3]):
            shapes = f"{own.shape[1]} heads of {own.shape[3]}, its config says {prefix.shape[0]} of {prefix.shape[2]}"
            message = f"an attention has keys or values with {shapes}: no prefix fits."
            raise ModelError("M567", message, "use prompt_tuning, or an adapter on its layers.")
        return torch.cat([prefix.to(own.dtype).expand(len(own), -1, -1, -1), own[:, :, : self.visible]], 2)


def self_attention(block: nn.Module) -> tuple[nn.Module, str]:
    """The self-attention of a block and the name under which it takes the KV cache. Raises: ModelError M567."""
    for child in block.children():
        while isinstance(child, Attachment):  # as a bottleneck behind it
            child = child.get_submodule("base_layer")
        cache = cache_name(child.forward)
        if cache and "attention_mask" in inspect.signature(child.forward).parameters:
            return child, cache
    message = f"no self-attention with a KV cache in a {type(block).__name__}, so no prefix can stand before it."
    raise ModelError("M567", message, "use prompt_tuning, or an adapter on its layers.")


def _is_flash(attention: nn.Module) -> bool:
    """Whether an attention aligns a causal mask with the last key, so that it needs none for a prefix."""
    config = getattr(attention, "config", None)
    config = getattr(config, "gated_from", config)  # of a gated one the model's own
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def key_shape(parts: Parts) -> tuple[int, int, int]:
    """(l, h, e) of a model, from its config."""
    config: Any = decoder_with(parts).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return len(parts.blocks), heads, width
