"""The perceiver resampler and the Q-Former against transformers and closed formulas."""

from __future__ import annotations

import pytest
import torch
from projector_parity import Tensors, assert_same_outputs_and_gradients, build, count, features, randomised, small
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vlmpeft.errors import ConfigError
from vlmpeft.projectors import QFormerProjector, ResamplerProjector

# Resampler


class ReferenceResampler(nn.Module):
    """Idefics' perceiver resampler after a linear layer, with GELU where Idefics has ReLU."""

    def __init__(self, in_dim: int, out_dim: int, *, queries: int, depth: int, heads: int, dim_head: int) -> None:
        super().__init__()
        config = IdeficsConfig(vision_config={"embed_dim": out_dim})
        self.linear = nn.Linear(in_dim, out_dim)
        self.perceiver = IdeficsPerceiverResampler(config, out_dim, depth, heads, dim_head, queries)
        for block in self.perceiver.blocks:
            block[1].act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.perceiver(self.linear(x))


IDEFICS = {
    "0.norm_media": ["0.context_layer_norm"],
    "0.norm_latents": ["0.latents_layer_norm"],
    "0.to_q": ["0.q_proj"],
    "0.to_kv": ["0.k_proj", "0.v_proj"],
    "0.to_out": ["0.output_proj"],
    "1.0": ["1.ln"],
    "1.1": ["1.fc"],
    "1.3": ["1.c_proj"],
}


def as_idefics(tensors: Tensors) -> Tensors:
    """Our resampler's tensors under Idefics' names."""
    outer = {"latents": "latents", "norm.weight": "layer_norm.weight", "norm.bias": "layer_norm.bias"}
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, index, *middle, kind = name.split(".")
            theirs = IDEFICS[".".join(middle)]
            for new, piece in zip(theirs, tensor.chunk(len(theirs)), strict=True):
                found[f"perceiver.blocks.{index}.{new}.{kind}"] = piece
        else:
            found[f"perceiver.{outer[name]}" if name in outer else name] = tensor
    return found


@pytest.mark.parametrize("n", [9, 60])
def test_resampler_matches_transformers_idefics(n: int) -> None:
    sizes = {"queries": 6, "depth": 2, "heads": 3, "dim_head": 8}
    ours, reference = ResamplerProjector(32, 48, **sizes), ReferenceResampler(32, 48, **sizes)
    assert_same_outputs_and_gradients(ours, reference, features(n), as_idefics)


def test_resampler_state_keys_and_shapes_are_tinyllavas() -> None:
    shapes = {k: tuple(v.shape) for k, v in build("resampler", 32, 48, queries=6, depth=1).state_dict().items()}
    assert shapes == {
        "latents": (6, 48),
        "linear.weight": (48, 32),
        "linear.bias": (48,),
        "layers.0.0.norm_media.weight": (48,),
        "layers.0.0.norm_media.bias": (48,),
        "layers.0.0.norm_latents.weight": (48,),
        "layers.0.0.norm_latents.bias": (48,),
        "layers.0.0.to_q.weight": (512, 48),
        "layers.0.0.to_kv.weight": (1024, 48),
        "layers.0.0.to_out.weight": (48, 512),
        "layers.0.1.0.weight": (48,),
        "layers.0.1.0.bias": (48,),
        "layers.0.1.1.weight": (192, 48),
        "layers.0.1.3.weight": (48, 192),
        "norm.weight": (48,),
        "norm.bias": (48,),
    }


@pytest.mark.parametrize(("in_dim", "out_dim", "queries", "depth"), [(1024, 2048, 128, 3), (1152, 2560, 64, 6)])
def test_resampler_parameter_count(in_dim: int, out_dim: int, queries: int, depth: int) -> None:
    with torch.device("meta"):
        found = count(build("resampler", in_dim, out_dim, queries=queries, depth=depth))
    layers = depth * (8 * out_dim**2 + 2054 * out_dim)
    assert found == queries * out_dim + in_dim * out_dim + 3 * out_dim + layers


def test_resampler_sizes_are_its_options() -> None:
    projector = ResamplerProjector(32, 48, queries=6, depth=1, heads=3, dim_head=8, ff_mult=2)
    attention = 4 * 48 + 4 * (3 * 8) * 48
    assert count(projector) == 6 * 48 + 32 * 48 + 3 * 48 + attention + 2 * 48 + 2 * 2 * 48 * 48
    assert projector(features(60)).shape == (2, 6, 48)


# Q-Former


class ReferenceQFormer(nn.Module):
    """Learned queries, transformers' Q-Former and a linear layer, put together as in its BLIP-2."""

    def __init__(self, in_dim: int, out_dim: int, queries: int, config: Blip2QFormerConfig) -> None:
        super().__init__()
        config.encoder_hidden_size = in_dim
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, config.hidden_size))
        self.qformer = Blip2QFormerModel(config).eval()
        self.language_projection = nn.Linear(config.hidden_size, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(x), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
        return self.language_projection(read)


@pytest.mark.parametrize("n", [9, 60])
@pytest.mark.parametrize(("depth", "cross_every"), [(3, 2), (2, 1), (4, 3)])
def test_qformer_matches_transformers_blip2(n: int, depth: int, cross_every: int) -> None:
    ours = QFormerProjector(
        32, 48, queries=5, depth=depth, width=24, heads=3, ff_mult=2, cross_every=cross_every
    )  # fmt: skip
    config = Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=depth, num_attention_heads=3, intermediate_size=48,
        cross_attention_frequency=cross_every,
    )  # fmt: skip
    assert_same_outputs_and_gradients(ours, ReferenceQFormer(32, 48, 5, config), features(n))


def test_qformer_has_blip2s_sizes_unless_told_otherwise() -> None:
    with torch.device("meta"):
        ours, reference = build("qformer", 1408, 2560), ReferenceQFormer(1408, 2560, 32, Blip2QFormerConfig())
    theirs = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == theirs


@pytest.mark.parametrize(("depth", "crossing"), [(1, 1), (2, 1), (3, 2), (12, 6)])
def test_qformer_parameter_count(depth: int, crossing: int) -> None:
    v, w, d = 1024, 768, 2048
    with torch.device("meta"):
        found = count(build("qformer", v, d, depth=depth))
    attention, cross = 4 * (w * w + w) + 2 * w, 2 * (w * w + w) + 2 * (v * w + w) + 2 * w
    feed_forward = 2 * 4 * w * w + 4 * w + w + 2 * w
    assert found == 32 * w + 2 * w + depth * (attention + feed_forward) + crossing * cross + w * d + d


def test_qformer_starts_as_bert_with_queries_that_differ() -> None:
    torch.manual_seed(0)
    projector = QFormerProjector(64, 8, width=96, heads=2, depth=2)
    for name, parameter in projector.qformer.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 2:
            assert 0.018 < parameter.std().item() < 0.022, name
        else:
            assert parameter.eq(1).all(), name
    tokens = projector(features(9, 64))[0].detach()
    assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 1e-3


def test_qformer_heads_must_divide_its_width() -> None:
    with pytest.raises(ConfigError, match=r"C102.*projector\.width is 100; allowed: a multiple of projector\.heads=12"):
        build("qformer", width=100)


# Both


@pytest.mark.parametrize("name", ["resampler", "qformer"])
def test_the_order_of_the_tokens_does_not_matter(name: str) -> None:
    projector, x = randomised(small(name)), features(60)
    shuffled = x[:, torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(projector(shuffled), projector(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(projector(x), projector(x * 2), atol=1e-2)
