"""Every family of encoders, tiny: what is selected, dropped and interpolated, against the libraries themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoders import CASES, MEAN, STD, Case, reference, save
from torch import Tensor

from vlmpeft.encoder import Encoder
from vlmpeft.vision import empty_vision, load_vision

Saved = Callable[[str], tuple[Case, str, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Case, name and directory of an architecture, written once."""
    made: dict[str, tuple[Case, str, Path]] = {}

    def get(key: str) -> tuple[Case, str, Path]:
        if key not in made:
            folder = tmp_path_factory.mktemp(key)
            made[key] = CASES[key], save(CASES[key], folder), folder
        return made[key]

    return get


def picture(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("key", CASES)
def test_features_are_the_librarys_own(saved: Saved, key: str, layer: int) -> None:
    case, name, folder = saved(key)
    encoder = load_vision(name, layer=layer)
    found = encoder(picture(case.size))
    torch.testing.assert_close(found, reference(case, folder, layer, picture(case.size)), rtol=1e-5, atol=1e-5)
    assert encoder.prefix_tokens == case.prefix
    assert found.shape == (2, encoder.num_tokens, encoder.width)
    assert encoder.num_tokens == encoder.grid[0] * encoder.grid[1]
    assert (encoder.image_size, encoder.mean, encoder.std) == (case.size, tuple(MEAN), tuple(STD))
    if layer == -1:
        assert (encoder.grid, encoder.width) == ((case.grid, case.grid), case.width)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("key", CASES)
def test_another_size_is_interpolated_as_the_library_does(saved: Saved, key: str, layer: int) -> None:
    case, name, folder = saved(key)
    encoder = load_vision(name, layer=layer, image_size=case.other)
    found = encoder(picture(case.other))
    torch.testing.assert_close(found, reference(case, folder, layer, picture(case.other)), rtol=1e-5, atol=1e-5)
    assert encoder.image_size == case.other
    if layer == -1:
        assert encoder.grid == (case.other_grid, case.other_grid)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("key", CASES)
def test_nothing_is_kept_that_the_selected_layer_does_not_read(saved: Saved, key: str, layer: int) -> None:
    case, name, _ = saved(key)
    encoder = load_vision(name, layer=layer).requires_grad_(True)
    encoder(picture(case.size)).square().sum().backward()
    unread = [n for n, p in encoder.named_parameters() if p.grad is None]
    assert [n for n in unread if n.rsplit(".", 1)[-1] not in case.unused] == []


@pytest.mark.parametrize("key", CASES)
def test_a_frozen_encoder_gives_no_graph_and_stays_in_eval_mode(saved: Saved, key: str) -> None:
    case, name, _ = saved(key)
    encoder: Encoder = load_vision(name, layer=-2)
    encoder.train()
    assert not any(m.training for m in encoder.modules())
    assert not encoder(picture(case.size).requires_grad_()).requires_grad


@pytest.mark.parametrize("key", ["clip", "hf_swin", "timm_vit", "swin", "open_clip_vit", "open_clip_resnet"])
def test_shapes_are_known_without_weights(saved: Saved, key: str) -> None:
    _, name, _ = saved(key)
    loaded, empty = load_vision(name, layer=-2), empty_vision(name, layer=-2)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert (empty.grid, empty.width, empty.prefix_tokens) == (loaded.grid, loaded.width, loaded.prefix_tokens)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}


@pytest.mark.parametrize("key", ["clip", "timm_clip", "open_clip_vit"])
def test_it_runs_in_bfloat16(saved: Saved, key: str) -> None:
    case, name, _ = saved(key)
    exact = load_vision(name, layer=-2)(picture(case.size))
    half = load_vision(name, layer=-2).to(torch.bfloat16)(picture(case.size))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)
