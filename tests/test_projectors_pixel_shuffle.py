"""Pixel shuffle against torch's pixel_unshuffle and the connectors of Idefics3, SmolVLM and InternVL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from projector_parity import Tensors, assert_same_outputs_and_gradients, build, count, features, small
from torch import Tensor, nn
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from vlmpeft.errors import ModelError
from vlmpeft.projectors import PixelShuffleProjector


def shuffled(grid: tuple[int, int], factor: int) -> tuple[Tensor, Tensor]:
    """Features of a grid, and what pixel shuffle alone makes of them: without the projection."""
    projector: Any = PixelShuffleProjector(32, 48, factor=factor)
    projector.input_grid, projector.projection = grid, nn.Identity()
    x = features(grid[0] * grid[1])
    return x, projector(x)


def unshuffled(picture: Tensor, factor: int) -> Tensor:
    """torch's space-to-depth of (i, d, rows, columns), its channels brought from (d p q) to our (p q d)."""
    blocks = F.pixel_unshuffle(picture, factor).unflatten(1, (picture.shape[1], factor**2))
    return blocks.permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)


@pytest.mark.parametrize(("grid", "factor"), [((8, 8), 2), ((6, 10), 2), ((9, 6), 3), ((8, 4), 4), ((5, 7), 1)])
def test_it_is_torchs_pixel_unshuffle_up_to_the_order_of_channels(grid: tuple[int, int], factor: int) -> None:
    x, out = shuffled(grid, factor)
    picture = x.transpose(1, 2).unflatten(2, grid)
    assert torch.equal(out, unshuffled(picture, factor))


@pytest.mark.parametrize(("grid", "factor", "padding"), [((7, 7), 2, (1, 1)), ((5, 8), 4, (3, 0)), ((6, 7), 3, (0, 2))])
def test_a_grid_it_does_not_divide_is_filled_up_with_zeros_below_and_right(
    grid: tuple[int, int], factor: int, padding: tuple[int, int]
) -> None:
    x, out = shuffled(grid, factor)
    rows, columns = grid[0] + padding[0], grid[1] + padding[1]
    picture = torch.zeros(2, 32, rows, columns)
    picture[:, :, : grid[0], : grid[1]] = x.transpose(1, 2).unflatten(2, grid)
    assert torch.equal(out, unshuffled(picture, factor))
    assert out.shape[1] == rows // factor * columns // factor


@pytest.mark.parametrize("connector", [Idefics3Connector, SmolVLMConnector])
@pytest.mark.parametrize("factor", [2, 4])
def test_it_matches_transformers_connectors_with_the_same_weights(connector: Any, factor: int) -> None:
    config = Idefics3Config(
        vision_config={"hidden_size": 32},
        text_config={"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1},
        scale_factor=factor,
    )

    def rename(tensors: Tensors) -> Tensors:
        return {k.replace("projection.0", "modality_projection.proj"): v for k, v in tensors.items()}

    ours = PixelShuffleProjector(32, 48, factor=factor)
    assert_same_outputs_and_gradients(ours, connector(config), features(64), rename)


def test_its_blocks_are_internvls_too() -> None:
    x, out = shuffled((6, 10), 2)
    theirs = InternVLModel.pixel_shuffle(None, x.unflatten(1, (6, 10)), scale_factor=0.5)
    assert torch.equal(out, theirs.flatten(1, 2))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_sets_the_linear_layers_after_it(depth: int) -> None:
    projector = small("pixel_shuffle", (6, 10), depth=depth)
    hidden = shuffled((6, 10), 2)[1]
    linears = [layer for layer in projector.projection if isinstance(layer, nn.Linear)]
    assert len(linears) == depth
    for index, layer in enumerate(linears):
        hidden = F.linear(F.gelu(hidden) if index else hidden, layer.weight, layer.bias)
    torch.testing.assert_close(projector(features(60)), hidden)
    biases = depth * 48 if depth > 1 else 0
    assert count(projector) == 4 * 32 * 48 + (depth - 1) * 48**2 + biases


@pytest.mark.parametrize(("grid", "most", "even"), [((7, 7), 7, "1, 7"), ((4, 6), 4, "1, 2"), ((12, 9), 9, "1, 3")])
def test_a_block_larger_than_the_grid_is_refused_with_the_factors_that_fit(
    grid: tuple[int, int], most: int, even: str
) -> None:
    projector, n = small("pixel_shuffle", grid, factor=10), grid[0] * grid[1]
    message = rf"^\[M513\] projector 'pixel_shuffle'.*10x10.*{grid[0]}x{grid[1]}\. Fix: .*factor to {most} .*: {even}\)"
    for call in (lambda: projector.num_tokens(n), lambda: projector(features(n))):
        with pytest.raises(ModelError, match=message):
            call()


def test_the_largest_factor_makes_one_token() -> None:
    assert small("pixel_shuffle", (7, 7), factor=7).num_tokens(49) == 1
    assert build("pixel_shuffle", 2, 3, factor=7)(features(49, 2)).shape == (2, 1, 3)
