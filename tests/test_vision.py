"""Encoders of timm and transformers: layer selection, prefix tokens, what is read from the model, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.vision import Encoder, load_vision

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "initializer_range": 0.3,
}  # fmt: skip
SMALL = {**SIZES, "intermediate_size": 24}
MODELS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**SMALL), 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SMALL), 0),
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES, mlp_ratio=2), 1),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3), 4),
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def save(folder: Path, kind: str, processor: bool = True, spoil_last: bool = False) -> Any:
    """Write a tiny random encoder. Returns: the transformers model."""
    torch.manual_seed(0)
    cls, config, _ = MODELS[kind]
    model = cls(config).eval()
    blocks = model.encoder.layers if kind in ("clip", "siglip") else model.encoder.layer
    if spoil_last:
        for parameter in blocks[-1].parameters():
            parameter.data.normal_()
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layer", [-1, -2, -3, 1])
def test_features_are_transformers_hidden_states_without_prefix(
    tmp_path: Path, kind: str, layer: int, pixels: Tensor
) -> None:
    model, prefix = save(tmp_path, kind), MODELS[kind][2]
    with torch.no_grad():
        expected = model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    encoder = load_vision(f"hf:{tmp_path}", layer=layer)
    found = encoder(pixels)
    assert encoder.prefix_tokens == prefix
    assert found.shape == (2, 16, 16)
    torch.testing.assert_close(found, expected[:, prefix:], rtol=0, atol=1e-6)
    assert (encoder.grid, encoder.width, encoder.num_tokens, encoder.image_size) == ((4, 4), 16, 16, 32)
    assert (encoder.mean, encoder.std) == (tuple(MEAN), tuple(STD))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_layer_minus_two_is_before_the_final_norm(tmp_path: Path, kind: str, pixels: Tensor) -> None:
    model = save(tmp_path, kind)
    found = load_vision(f"hf:{tmp_path}", layer=-2)(pixels)
    with torch.no_grad():
        normed = model.post_layernorm(found)
    assert not torch.allclose(found, normed, atol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_layers_weights_do_not_reach_layer_minus_two(tmp_path: Path, kind: str, pixels: Tensor) -> None:
    save(tmp_path / "a", kind)
    save(tmp_path / "b", kind, spoil_last=True)
    found = [[load_vision(f"hf:{tmp_path / name}", layer=layer)(pixels) for name in "ab"] for layer in (-2, -1)]
    assert torch.equal(*found[0])
    assert not torch.allclose(*found[1])


def test_blocks_above_the_selected_layer_are_not_kept(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    layers = [len(load_vision(f"hf:{tmp_path}", layer=layer).backbone.encoder.layers) for layer in (-1, -2, -3)]  # type: ignore[union-attr, arg-type]
    assert layers == [3, 2, 1]


def test_siglip_keeps_its_first_patch(tmp_path: Path) -> None:
    save(tmp_path, "siglip")
    encoder = load_vision(f"hf:{tmp_path}", layer=-2)
    blank = torch.zeros(1, 3, 32, 32)
    touched = blank.clone()
    touched[..., :8, :8] = 3.0  # the first patch alone
    moved = (encoder(touched) - encoder(blank)).abs().amax(-1)[0]
    assert moved.argmax() == 0


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    with pytest.raises(ModelError, match=r"M545.*layer=-9.*4 hidden states"):
        load_vision(f"hf:{tmp_path}", layer=-9)
    with pytest.raises(ModelError, match=r"M545.*layer=-9.*6 layers"):
        load_vision("timm:test_vit", weights="random", layer=-9)


def test_mean_and_std_must_be_known_and_can_be_given(tmp_path: Path) -> None:
    save(tmp_path, "clip", processor=False)
    with pytest.raises(ModelError, match=r"M544.*vision.mean"):
        load_vision(f"hf:{tmp_path}")
    encoder = load_vision(f"hf:{tmp_path}", mean=(0.1, 0.2, 0.3), std=(1, 1, 1), image_size=48)
    assert (encoder.mean, encoder.image_size, encoder.grid) == ((0.1, 0.2, 0.3), 48, (6, 6))


def test_weights_that_lack_a_tensor_are_refused_not_left_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "clip")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(k for k in sorted(tensors) if "layers.0" in k)
    save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"M548.*layers\.0"):
        load_vision(f"hf:{tmp_path}")


def test_a_broken_directory_is_not_called_unreachable(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="M547"):
        load_vision(f"hf:{tmp_path}")
    with pytest.raises(EnvironmentFault, match="E420"):
        load_vision("hf:nobody/no-such-encoder")


TIMM = {
    "test_vit": (1, True),
    "test_efficientnet": (0, False),
    "vit_tiny_patch16_224": (1, True),
    "vit_tiny_patch16_dinov3_qkvb": (5, True),
    "test_mambaout": (0, False),  # channels last
}


@pytest.mark.parametrize("name", [n for n in TIMM if timm.is_model(n)])
def test_timm_features_are_the_models_own_without_prefix(name: str) -> None:
    prefix, tokens = TIMM[name]
    encoder = load_vision(f"timm:{name}", weights="random")
    image = torch.randn(1, 3, encoder.image_size, encoder.image_size)
    found = encoder(image)
    with torch.no_grad():
        own = encoder.backbone.forward_features(image)  # type: ignore[operator]
    flat = own[:, prefix:] if tokens else own.flatten(2).mT if own.shape[1] == encoder.width else own.flatten(1, 2)
    assert encoder.prefix_tokens == prefix
    assert encoder.width == encoder.backbone.num_features
    assert found.shape == (1, encoder.num_tokens, encoder.width)
    assert torch.equal(found, flat)


def test_timm_layer_minus_two_is_the_block_before_the_last() -> None:
    encoder = load_vision("timm:test_vit", weights="random", layer=-2)
    image, caught = torch.randn(1, 3, 160, 160), []
    hook = encoder.backbone.blocks[-2].register_forward_hook(lambda m, a, out: caught.append(out))  # type: ignore[index]
    found = encoder(image)
    hook.remove()
    assert torch.equal(found, caught[0][:, 1:])
    ran: list[int] = []
    encoder.backbone.blocks[-1].register_forward_hook(lambda m, a, out: ran.append(1))  # type: ignore[index]
    encoder(image)
    assert not ran


def test_image_size_of_a_vit_and_of_a_convolutional_model() -> None:
    assert load_vision("timm:test_vit", weights="random", image_size=96).grid == (6, 6)
    assert load_vision("timm:test_efficientnet", weights="random", image_size=96).grid == (3, 3)


def test_random_weights_are_the_same_wherever_they_are_made() -> None:
    torch.manual_seed(1)
    first = load_vision("timm:test_efficientnet", weights="random").state_dict()
    state = torch.get_rng_state()
    second = load_vision("timm:test_efficientnet", weights="random").state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"M543.*did you mean 'vit_tiny_patch16_224'"):
        load_vision("timm:vit_tiny_patch16_225", weights="random")
    with pytest.raises(ModelError, match="M541"):
        load_vision("vit_tiny_patch16_224")


def test_a_frozen_encoder_gives_no_graph_and_stays_in_eval_mode() -> None:
    encoder = load_vision("timm:test_efficientnet", weights="random")
    outer = torch.nn.ModuleDict({"vision": encoder, "other": torch.nn.Dropout()})
    outer.train()
    assert outer["other"].training
    assert not any(m.training for m in encoder.modules())
    image = torch.randn(2, 3, 160, 160, requires_grad=True)
    assert not encoder(image).requires_grad


def test_a_tuned_encoder_gives_a_graph_and_trains(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    encoder: Encoder = load_vision(f"hf:{tmp_path}", layer=-2).requires_grad_(True)
    encoder.train()
    encoder(torch.randn(1, 3, 32, 32)).sum().backward()
    assert encoder.backbone.training
    assert encoder.backbone.encoder.layers[0].mlp.fc1.weight.grad is not None  # type: ignore[union-attr, index]
