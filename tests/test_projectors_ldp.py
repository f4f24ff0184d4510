"""LDP and LDPv2 against torchvision, timm, MobileVLM's keys and closed formulas."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from projector_parity import assert_same_outputs_and_gradients, build, count, features, randomised, small
from timm.layers.norm_act import LayerNormAct2d
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.projectors import LDPProjector, LDPv2Projector


class ReferenceLDP(nn.Module):
    """LDP put together from torchvision's MobileNetV3 block and timm's LayerNormAct2d, as MobileVLM does."""

    def __init__(self, in_dim: int, out_dim: int, grid: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.grid = grid
        norm: Any = partial(LayerNormAct2d, apply_act=False)

        def block(stride: int) -> nn.Module:
            return InvertedResidual(
                InvertedResidualConfig(out_dim, 3, out_dim, out_dim, True, "HS", stride, 1, 1), norm
            )

        mlp = nn.Sequential(nn.Identity(), nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
        self.model = nn.ModuleDict({"mlp": mlp, "mb_block": nn.Sequential(nn.Identity(), block(1), block(2))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.model["mlp"](x).transpose(1, 2).unflatten(2, self.grid)
        return self.model["mb_block"](x).flatten(2).transpose(1, 2)


class ReferenceLDPv2(nn.Module):
    """LDPv2 with adaptive pooling for every size."""

    def __init__(self, in_dim: int, out_dim: int, grid: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.grid = grid
        self.mlp = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))}
        )
        self.pool = nn.AdaptiveAvgPool2d((pooled, pooled))
        self.peg = nn.ModuleDict(
            {"peg": nn.Sequential(nn.Conv2d(out_dim, out_dim, 3, 1, 1, groups=out_dim, bias=True))}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.mlp["mlp"](x).transpose(1, 2).unflatten(2, self.grid))
        return (self.peg["peg"](x) + x).flatten(2).transpose(1, 2)


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


@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (6, 10), (5, 3)])
def test_ldp_matches_torchvision_and_timm(grid: tuple[int, int]) -> None:
    ours, reference = small("ldp", grid), ReferenceLDP(32, 48, grid)
    assert_same_outputs_and_gradients(ours, reference, features(grid[0] * grid[1]))


def test_ldp_without_a_grid_takes_a_square() -> None:
    reference = ReferenceLDP(32, 48, (8, 8))
    assert_same_outputs_and_gradients(LDPProjector(32, 48), reference, features(64))


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


@pytest.mark.parametrize(
    ("grid", "pooled"), [((8, 8), 12), ((24, 24), 12), ((7, 7), 7), ((7, 7), 3), ((6, 10), 4), ((6, 9), 3)]
)
def test_ldpv2_matches_adaptive_pooling_and_a_torch_conv(grid: tuple[int, int], pooled: int) -> None:
    ours, reference = LDPv2Projector(32, 48, grid=pooled), ReferenceLDPv2(32, 48, grid, pooled)
    ours.input_grid = grid
    assert_same_outputs_and_gradients(ours, reference, features(grid[0] * grid[1]))


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
