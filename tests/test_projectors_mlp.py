"""Linear, MLP and identity against transformers and closed formulas, and the scale every projector can fix."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from projector_parity import NAMES, build, count, features, small
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.projectors import IdentityProjector, LinearProjector, MLPProjector


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_mlp_formula_keys_and_count(depth: int) -> None:
    projector = build(f"mlp{depth}x_gelu", 6, 10)
    assert isinstance(projector, MLPProjector)
    assert list(projector.state_dict()) == [f"{2 * i}.{p}" for i in range(depth) for p in ("weight", "bias")]
    assert count(projector) == 6 * 10 + (depth - 1) * 100 + depth * 10
    h = x = features(5, 6)
    for i in range(depth):
        if i:
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))  # exact GELU
        layer = cast(nn.Linear, projector[2 * i])
        h = h @ layer.weight.T + layer.bias
    torch.testing.assert_close(projector(x), h)


@pytest.mark.parametrize(("out_dim", "parameters"), [(2048, 6_295_552), (4096, 20_979_712), (5120, 31_467_520)])
def test_mlp2x_parameter_count(out_dim: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(build("mlp2x_gelu", 1024, out_dim)) == parameters


def test_mlp_matches_transformers_llava_projector() -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8),
        text_config=LlamaConfig(hidden_size=48, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8),
    )
    reference = LlavaMultiModalProjector(config)
    ours = MLPProjector(32, 48)
    state = {k.replace("linear_1", "0").replace("linear_2", "2"): v for k, v in reference.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    torch.testing.assert_close(ours(features(9)), reference(features(9)), atol=0, rtol=0)


def test_mlp_starts_as_pytorch_does() -> None:
    torch.manual_seed(0)
    ours = MLPProjector(6, 10)
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 10))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), reference.parameters(), strict=True))


def test_mlp_depth_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"C102.*depth is 0"):
        MLPProjector(6, 10, depth=0)


def test_linear_is_an_nn_linear_with_llavas_keys() -> None:
    projector: Any = LinearProjector(6, 10)
    assert list(projector.state_dict()) == ["weight", "bias"]
    x = features(5, 6)
    torch.testing.assert_close(projector(x), x @ projector.weight.T + projector.bias)


# Identity


def test_identity_gives_back_what_it_gets() -> None:
    projector = IdentityProjector(32, 32)
    x = features(9)
    assert projector(x) is x
    assert projector.num_tokens(9) == 9
    assert projector.state_dict() == {}


def test_identity_refuses_two_widths_and_names_both() -> None:
    with pytest.raises(ModelError, match=r"^\[M517\] projector 'identity'.* 1024 wide .* 2048\. Fix: .*mlp2x_gelu"):
        build("identity", 1024, 2048)


# Scale


SCALED = [name for name in NAMES if name != "identity"]


@pytest.mark.parametrize("name", SCALED)
def test_rms_brings_every_output_token_to_one_scale_and_keeps_its_direction(name: str) -> None:
    torch.manual_seed(0)
    plain = small(name)
    torch.manual_seed(0)
    scaled = small(name, rms=0.133)
    assert list(scaled.state_dict()) == list(plain.state_dict())
    x = features(64)
    tokens, before = scaled(x), plain(x)
    torch.testing.assert_close(tokens.square().mean(-1).sqrt(), torch.full(tokens.shape[:2], 0.133), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        tokens, before * 0.133 / before.square().mean(-1, keepdim=True).sqrt(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("name", SCALED)
def test_rms_must_not_be_negative(name: str) -> None:
    with pytest.raises(ConfigError, match=r"C102.*projector\.rms is -0\.5; allowed: 0 or more"):
        small(name, rms=-0.5)


def test_dropout_drops_features_in_training_alone() -> None:
    width, projector = 6, cast(MLPProjector, build("mlp1x_gelu", 6, 3, dropout=0.3))
    ones, first = torch.ones(1, 2000, width), cast(nn.Linear, projector[0])
    with torch.no_grad():
        first.weight.fill_(1.0)
        first.bias.zero_()
    assert projector.eval()(ones).unique().tolist() == [width]
    torch.manual_seed(0)
    sums = projector.train()(ones)[..., 0]
    torch.testing.assert_close(sums.mean(), torch.tensor(float(width)), rtol=0.02, atol=0)
    kept = sums * 0.7  # each kept feature counts 1 / 0.7
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    assert kept.max() <= width + 1e-4
    assert kept.min() < width - 0.5
    with pytest.raises(ConfigError, match=r"C102.*projector\.dropout is 1\.0"):
        build("mlp1x_gelu", 6, 3, dropout=1.0)
