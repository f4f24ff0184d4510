"""Projectors against torchvision, timm, transformers and closed formulas."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from timm.layers.norm_act import LayerNormAct2d
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.projectors import (
    PROJECTORS,
    LDPProjector,
    LDPv2Projector,
    LinearProjector,
    MLPProjector,
    Projector,
)
from vlmpeft.projectors.base import ProjectorRegistry


def build(name: str, in_dim: int = 32, out_dim: int = 48, **options: Any) -> Any:
    return PROJECTORS.build(name, in_dim, out_dim, **options)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def features(n: int, width: int = 32, images: int = 2) -> Tensor:
    return torch.randn(images, n, width, generator=torch.Generator().manual_seed(n))


def randomised(module: nn.Module) -> Any:
    """Every parameter random, LayerNorms too, so that no swap of two tensors goes unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


class ReferenceLDP(nn.Module):
    """LDP put together from torchvision's MobileNetV3 block and timm's LayerNormAct2d, as MobileVLM does."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        norm: Any = partial(LayerNormAct2d, apply_act=False)

        def block(stride: int) -> nn.Module:
            return InvertedResidual(
                InvertedResidualConfig(out_dim, 3, out_dim, out_dim, True, "HS", stride, 1, 1), norm
            )

        mlp = nn.Sequential(nn.Identity(), nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
        self.model = nn.ModuleDict({"mlp": mlp, "mb_block": nn.Sequential(nn.Identity(), block(1), block(2))})

    def forward(self, x: Tensor) -> Tensor:
        side = int(math.sqrt(x.shape[1]))
        x = self.model["mlp"](x).transpose(1, 2).unflatten(2, (side, side))
        return self.model["mb_block"](x).flatten(2).transpose(1, 2)


class ReferenceLDPv2(nn.Module):
    """LDPv2 with adaptive pooling for every size."""

    def __init__(self, in_dim: int, out_dim: int, grid: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))}
        )
        self.pool = nn.AdaptiveAvgPool2d((grid, grid))
        self.peg = nn.ModuleDict(
            {"peg": nn.Sequential(nn.Conv2d(out_dim, out_dim, 3, 1, 1, groups=out_dim, bias=True))}
        )

    def forward(self, x: Tensor) -> Tensor:
        side = int(math.sqrt(x.shape[1]))
        x = self.pool(self.mlp["mlp"](x).transpose(1, 2).unflatten(2, (side, side)))
        return (self.peg["peg"](x) + x).flatten(2).transpose(1, 2)


def assert_same_outputs_and_gradients(ours: nn.Module, reference: nn.Module, x: Tensor) -> None:
    reference.load_state_dict(randomised(ours).state_dict(), strict=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a), reference(b)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = {"input": b, **dict(reference.named_parameters())}
    for name, tensor in {"input": a, **dict(ours.named_parameters())}.items():
        grad, wanted = cast(Tensor, tensor.grad), cast(Tensor, theirs[name].grad)
        assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


# LDP


@pytest.mark.parametrize(
    ("in_dim", "out_dim", "parameters"),
    [(1024, 2048, 18_936_832), (1024, 2560, 28_913_920), (1024, 4096, 71_428_096), (32, 48, 12_992)],
)
def test_ldp_parameter_count(in_dim: int, out_dim: int, parameters: int) -> None:
    with torch.device("meta"):
        projector: Any = LDPProjector(in_dim, out_dim)
    s = projector.model["mb_block"][1].block[1].fc1.out_channels
    assert count(projector) == parameters
    assert parameters == in_dim * out_dim + 3 * out_dim**2 + 4 * s * out_dim + 2 * s + 30 * out_dim


@pytest.mark.parametrize("out_dim", [8, 24, 40, 48, 56, 104, 200, 2048, 2560])
def test_ldp_squeeze_width_is_torchvisions(out_dim: int) -> None:
    with torch.device("meta"):
        ours, reference = LDPProjector(8, out_dim), ReferenceLDP(8, out_dim)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


@pytest.mark.parametrize(("n", "tokens"), [(576, 144), (256, 64), (64, 16), (729, 196), (49, 16), (1, 1)])
def test_ldp_halves_each_side_rounding_up(n: int, tokens: int) -> None:
    projector = LDPProjector(32, 48)
    assert projector(features(n)).shape == (2, tokens, 48)
    assert projector.num_tokens(n) == tokens


def test_ldp_state_keys_and_shapes_are_mobilevlms() -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in LDPProjector(1024, 2048).state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {
        "model.mlp.1.weight": (2048, 1024),
        "model.mlp.1.bias": (2048,),
        "model.mlp.3.weight": (2048, 2048),
        "model.mlp.3.bias": (2048,),
    }
    for block in ("model.mb_block.1.block", "model.mb_block.2.block"):
        expected |= {
            f"{block}.0.0.weight": (2048, 1, 3, 3),
            f"{block}.0.1.weight": (2048,),
            f"{block}.0.1.bias": (2048,),
            f"{block}.1.fc1.weight": (512, 2048, 1, 1),
            f"{block}.1.fc1.bias": (512,),
            f"{block}.1.fc2.weight": (2048, 512, 1, 1),
            f"{block}.1.fc2.bias": (2048,),
            f"{block}.2.0.weight": (2048, 2048, 1, 1),
            f"{block}.2.1.weight": (2048,),
            f"{block}.2.1.bias": (2048,),
        }
    assert shapes == expected


@pytest.mark.parametrize("n", [64, 49])
def test_ldp_matches_torchvision_and_timm(n: int) -> None:
    assert_same_outputs_and_gradients(LDPProjector(32, 48), ReferenceLDP(32, 48), features(n))


def test_ldp_residual_only_in_the_first_block() -> None:
    projector = randomised(LDPProjector(32, 48))
    _, first, second = projector.model["mb_block"]
    for block in (first, second):
        nn.init.zeros_(block.block[2][1].weight)
    x = torch.randn(2, 48, 8, 8)
    torch.testing.assert_close(first(x), x + first.block[2][1].bias.view(1, -1, 1, 1))
    torch.testing.assert_close(second(x), second.block[2][1].bias.view(1, -1, 1, 1).expand(2, -1, 4, 4))


# LDPv2


@pytest.mark.parametrize(("out_dim", "parameters"), [(2048, 6_316_032), (2560, 9_205_760), (4096, 21_020_672)])
def test_ldpv2_parameter_count(out_dim: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(LDPv2Projector(1024, out_dim)) == parameters == 1024 * out_dim + out_dim**2 + 12 * out_dim


def test_ldpv2_state_keys_and_shapes_are_mobilevlms() -> None:
    shapes = {k: tuple(v.shape) for k, v in LDPv2Projector(32, 48).state_dict().items()}
    assert shapes == {
        "mlp.mlp.0.weight": (48, 32),
        "mlp.mlp.0.bias": (48,),
        "mlp.mlp.2.weight": (48, 48),
        "mlp.mlp.2.bias": (48,),
        "peg.peg.0.weight": (48, 1, 3, 3),
        "peg.peg.0.bias": (48,),
    }


@pytest.mark.parametrize("n", [64, 256, 576])
def test_ldpv2_gives_144_tokens_whatever_comes_in(n: int) -> None:
    projector: Any = LDPv2Projector(32, 48)
    assert projector(features(n)).shape == (2, 144, 48)
    assert projector.num_tokens(n) == 144


@pytest.mark.parametrize(("n", "grid"), [(49, 7), (49, 3), (64, 4), (576, 6)])
def test_ldpv2_grid_sets_the_token_count(n: int, grid: int) -> None:
    projector = build("ldpv2", grid=grid)
    assert projector(features(n)).shape == (2, grid**2, 48)
    assert projector.num_tokens(n) == grid**2


@pytest.mark.parametrize(("n", "grid"), [(64, 12), (256, 12), (576, 12), (49, 7), (49, 3)])
def test_ldpv2_matches_adaptive_pooling_and_a_torch_conv(n: int, grid: int) -> None:
    assert_same_outputs_and_gradients(LDPv2Projector(32, 48, grid=grid), ReferenceLDPv2(32, 48, grid), features(n))


def test_ldpv2_without_peg_is_the_mean_of_2x2_patches() -> None:
    projector: Any = LDPv2Projector(32, 48)
    for p in projector.peg.parameters():
        nn.init.zeros_(p)
    x = features(576)
    corners = projector.mlp["mlp"](x).view(2, 12, 2, 12, 2, 48)  # row-major: rows, then columns
    torch.testing.assert_close(projector(x), corners.mean(dim=(2, 4)).reshape(2, 144, 48))


def test_ldpv2_peg_bias_is_added_everywhere() -> None:
    projector: Any = LDPv2Projector(32, 48)
    for p in projector.peg.parameters():
        nn.init.zeros_(p)
    x, c = features(256), torch.randn(48)
    before = projector(x)
    with torch.no_grad():
        projector.peg["peg"][0].bias.copy_(c)
    torch.testing.assert_close(projector(x), before + c)


@pytest.mark.parametrize("grid", [0, -3])
def test_ldpv2_grid_must_be_positive(grid: int) -> None:
    with pytest.raises(ConfigError, match=rf"C102.*grid is {grid}"):
        LDPv2Projector(32, 48, grid=grid)


# Both


@pytest.mark.parametrize("name", ["ldp", "ldpv2"])
@pytest.mark.parametrize("n", [0, 2, 577, 728])
def test_grid_projectors_refuse_a_number_of_tokens_that_is_no_square(name: str, n: int) -> None:
    projector = build(name)
    with pytest.raises(ModelError, match=rf"M513.*{name}.*n={n} .*mlp2x_gelu"):
        projector(features(n))
    with pytest.raises(ModelError, match=rf"M513.*n={n} "):
        projector.num_tokens(n)


# Linear and MLP


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


# Every registered projector


@pytest.mark.parametrize("name", [*PROJECTORS, "mlp3x_gelu"])
@pytest.mark.parametrize("n", [64, 256])
def test_num_tokens_is_the_number_of_output_tokens_and_gradients_are_finite(name: str, n: int) -> None:
    projector = build(name)
    x = features(n).requires_grad_()
    out = projector(x)
    assert out.shape == (2, projector.num_tokens(n), 48)
    out.square().mean().backward()
    for tensor in (x, *projector.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


@pytest.mark.parametrize("name", list(PROJECTORS))
def test_every_projector_runs_in_bfloat16(name: str) -> None:
    projector = build(name).to(torch.bfloat16)
    assert projector(features(64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", list(PROJECTORS))
def test_images_do_not_influence_each_other_and_none_is_fine(name: str) -> None:
    projector, x = build(name), features(64)
    torch.testing.assert_close(projector(x)[1:], projector(x[1:]))
    assert projector(x[:0]).shape == (0, projector.num_tokens(64), 48)


# Names


def test_registry_lists_names_and_knows_the_family() -> None:
    assert {"linear", "mlp2x_gelu", "ldp", "ldpv2"} <= set(PROJECTORS)
    assert all(name in PROJECTORS for name in (*PROJECTORS, "mlp1x_gelu", "mlp3x_gelu", "mlp12x_gelu"))


@pytest.mark.parametrize(
    "name", ["mlp0x_gelu", "mlp02x_gelu", "mlp2x_gelu\n", "xmlp2x_gelu", "mlpx_gelu", "mlp2x_relu", "", 3]
)
def test_names_near_the_family_are_not_in_it(name: object) -> None:
    assert name not in PROJECTORS


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("mlp2_gelu", "mlp2x_gelu"),
        ("mlp0x_gelu", "mlp2x_gelu"),
        ("ldpnetv2", "ldpv2"),
        ("liner", "linear"),
        ("ldpnet", "ldp"),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"C103.*no projector '{name}'; did you mean '{suggestion}'\? \(known: .*mlp2x_gelu"
    ):
        build(name)


def test_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"C104.*no option 'gird'; did you mean 'grid'"):
        build("ldpv2", gird=7)
    with pytest.raises(ConfigError, match=r"C104.*'mlp2x_gelu' has no option 'depth'"):
        build("mlp2x_gelu", depth=3)


def test_options_are_the_keyword_only_parameters() -> None:
    assert {name: list(PROJECTORS.options(name)) for name in ("linear", "mlp3x_gelu", "ldp", "ldpv2")} == {
        "linear": [],
        "mlp3x_gelu": ["rms"],
        "ldp": [],
        "ldpv2": ["grid"],
    }
    assert PROJECTORS.options("ldpv2")["grid"].default == 12


def test_a_projector_of_ones_own_is_one_small_class() -> None:
    registry = ProjectorRegistry()

    @registry.register("mine")
    class Mine(nn.Module):
        def __init__(self, in_dim: int, out_dim: int, *, keep: int = 4) -> None:
            super().__init__()
            self.keep, self.linear = keep, nn.Linear(in_dim, out_dim)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x[:, : self.keep])

        def num_tokens(self, n: int) -> int:
            return min(n, self.keep)

    projector = registry.build("mine", 32, 48, keep=3)
    assert isinstance(projector, Projector)
    assert projector(features(64)).shape == (2, projector.num_tokens(64), 48)


def test_a_projector_without_num_tokens_is_refused() -> None:
    registry = ProjectorRegistry()
    registry.register("plain")(cast(Any, nn.Linear))
    with pytest.raises(ModelError, match=r"M514.*'plain' \(Linear\) has no num_tokens"):
        registry.build("plain", 32, 48)


@pytest.mark.parametrize("name", ["ldp", "mlp5x_gelu"])
def test_a_taken_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"C120.*'{name}' is already registered"):
        PROJECTORS.register(name)(LinearProjector)


def test_the_bare_package_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    with pytest.raises(ImportError, match=r"vlmpeft\.projectors"):
        __import__("projectors")
