"""Every projector: its table of behaviours, its name and options, and one of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from projector_parity import NAMES, SMALL, build, count, features, small
from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.projectors import PROJECTORS, LinearProjector, Projector
from vlmpeft.projectors.base import ProjectorRegistry
from vlmpeft.weights import read_strict

GRIDS = [(8, 8), (7, 7), (6, 10), (10, 6), (3, 5), (24, 24)]
TOKENS: dict[str, Callable[[int, int], int]] = {  # after the projector, of a grid of rows x columns
    "identity": lambda rows, columns: rows * columns,
    "ldp": lambda rows, columns: ceil(rows / 2) * ceil(columns / 2),
    "ldpv2": lambda rows, columns: 12 * 12,
    "linear": lambda rows, columns: rows * columns,
    "mlp2x_gelu": lambda rows, columns: rows * columns,
    "mlp3x_gelu": lambda rows, columns: rows * columns,
    "pixel_shuffle": lambda rows, columns: ceil(rows / 2) * ceil(columns / 2),
    "qformer": lambda rows, columns: 5,
    "resampler": lambda rows, columns: 6,
}


# Every registered projector


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_num_tokens_needs_no_forward_and_is_the_number_of_output_tokens(name: str, grid: tuple[int, int]) -> None:
    projector, n = small(name, grid), grid[0] * grid[1]
    assert projector.num_tokens(n) == TOKENS[name](*grid)
    assert projector(features(n)).shape == (2, projector.num_tokens(n), 32 if name == "identity" else 48)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(8, 8), (7, 5)])
def test_gradients_reach_every_weight_and_the_features(name: str, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    projector = small(name, grid)
    x = features(grid[0] * grid[1]).requires_grad_()
    projector(x).sin().mean().backward()  # not a sum of squares, which a last LayerNorm keeps constant
    for where, tensor in {"features": x, **dict(projector.named_parameters())}.items():
        assert tensor.grad is not None, where
        assert tensor.grad.isfinite().all(), where
        # a bias of the keys adds the same to every score, which softmax takes away
        assert tensor.grad.any() or where.endswith("key.bias"), where


@pytest.mark.parametrize("name", NAMES)
def test_every_projector_runs_and_learns_in_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    projector, x = small(name), features(64)
    wanted = projector(x)
    projector.to(torch.bfloat16)
    out = projector(x.bfloat16().requires_grad_())
    assert out.dtype == torch.bfloat16
    assert (out - wanted).norm() < 0.03 * wanted.norm()
    out.float().sin().mean().backward()
    assert all(p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_images_do_not_influence_each_other_and_none_is_fine(name: str) -> None:
    projector, x = small(name), features(64)
    torch.testing.assert_close(projector(x)[1:], projector(x[1:]))
    assert projector(x[:0]).shape == (0, projector.num_tokens(64), projector(x).shape[2])


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_alone_decides_the_first_weights(name: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(small(name).state_dict())
    first, second, other = states
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert name == "identity" or not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_come_back_and_the_grid_is_not_among_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    ours, x = small(name, (6, 10)), features(60)
    fs.write_tensors(tmp_path / "projector.safetensors", ours.state_dict())
    torch.manual_seed(2)
    other = small(name, (6, 10))
    other.load_state_dict(read_strict(tmp_path / "projector.safetensors", other.state_dict()), strict=True)
    assert torch.equal(other(x), ours(x))
    assert list(ours.state_dict()) == [key for key, _ in ours.named_parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_every_projector_is_built_without_memory_for_a_dry_run(name: str) -> None:
    with torch.device("meta"):
        projector = small(name)
    assert all(p.is_meta for p in projector.parameters())
    assert projector.num_tokens(64) == TOKENS[name](8, 8)


COUNTS = {
    "ldpv2": ["grid"],
    "pixel_shuffle": ["factor", "depth"],
    "resampler": ["queries", "depth", "heads", "dim_head", "ff_mult"],
    "qformer": ["queries", "depth", "width", "heads", "ff_mult", "cross_every"],
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in COUNTS.items() for option in options])
def test_a_count_below_one_is_refused_by_its_name(name: str, option: str) -> None:
    for value in (0, -3):
        with pytest.raises(ConfigError, match=rf"C102.*projector\.{option} is {value}; allowed: 1 or more"):
            build(name, **{**SMALL.get(name, {}), option: value})


# Names


def test_registry_lists_names_and_knows_the_family() -> None:
    assert set(NAMES) == TOKENS.keys()
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
    assert {name: list(PROJECTORS.options(name)) for name in NAMES} == {
        "identity": [],
        "ldp": ["rms"],
        "linear": ["rms"],
        "mlp2x_gelu": ["rms", "dropout"],
        "mlp3x_gelu": ["rms", "dropout"],
        **{name: [*counts, "rms"] for name, counts in COUNTS.items()},
    }
    assert PROJECTORS.options("ldpv2")["grid"].default == 12


@pytest.mark.parametrize("name", NAMES)
def test_every_projector_answers_an_option_it_does_not_have(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"C104.*projector '{name}' has no option 'input_grid'"):
        build(name, input_grid=(6, 10))


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


# The page


def page() -> dict[str, list[str]]:
    """The table of docs/projectors.md: the cells after each projector's name."""
    text = (Path(__file__).parents[1] / "docs" / "projectors.md").read_text(encoding="utf-8")
    table = text.split("| name |", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name.strip("`"): cells for name, *cells in rows}


def test_the_page_lists_every_projector() -> None:
    assert page().keys() == TOKENS.keys() - {"mlp3x_gelu"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mlp3x_gelu"])
def test_the_pages_numbers_are_the_codes(name: str) -> None:
    large, little, parameters, options, _ = page()[name]
    with torch.device("meta"):
        projector = build(name, 1024, 1024 if name == "identity" else 2048)
    assert (int(large), int(little)) == (projector.num_tokens(576), projector.num_tokens(49))
    assert int(parameters.replace(",", "")) == count(projector)
    known = PROJECTORS.options(name).values()
    assert options == " ".join(f"`{option.name}={option.default}`" for option in known)
