"""What `load_vision` promises: LLaVA's selection at real token counts, what is cut, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import CASES, MEAN, STD, save, scatter
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, SiglipVisionConfig, SiglipVisionModel

from vlmpeft.encoder import Encoder, Pixels
from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.projectors import PROJECTORS
from vlmpeft.projectors.base import fit_grid
from vlmpeft.vision import empty_vision, load_vision

TINY: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14,
}  # fmt: skip
CLIP = CASES["clip"]
LAST = {  # the last block or stage of one tiny model of each source, by its tensors' names
    "clip": "encoder.layers.2.",
    "timm_vit": "blocks.2.",
    "open_clip_vit": "visual.transformer.resblocks.2.",
}


def save_hf(model: Any, folder: Path) -> Any:
    """Write a model of transformers with its image settings. Returns: the model."""
    scatter(model).save_pretrained(folder)  # type: ignore[operator]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


def picture(size: int) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_clip_at_336_gives_576_tokens_without_the_final_norm(tmp_path: Path) -> None:
    model = save_hf(CLIPVisionModel(CLIPVisionConfig(**TINY, image_size=336)), tmp_path)
    encoder = load_vision(f"hf:{tmp_path}", layer=-2)
    found = encoder(picture(336))
    with torch.no_grad():
        hidden = model(pixel_values=picture(336), output_hidden_states=True).hidden_states[-2][:, 1:]
        normed = model.post_layernorm(hidden)
    assert (found.shape, encoder.grid) == ((1, 576, 8), (24, 24))
    torch.testing.assert_close(found, hidden)
    assert not torch.allclose(found, normed, atol=1e-2)


def test_siglip_at_384_gives_729_tokens_and_keeps_its_first_patch(tmp_path: Path) -> None:
    model = save_hf(SiglipVisionModel(SiglipVisionConfig(**TINY, image_size=384)), tmp_path)
    encoder = load_vision(f"hf:{tmp_path}", layer=-2)
    with torch.no_grad():
        hidden = model(pixel_values=picture(384), output_hidden_states=True).hidden_states[-2]
    assert (encoder.num_tokens, encoder.grid, encoder.prefix_tokens) == (729, (27, 27), 0)
    torch.testing.assert_close(encoder(picture(384)), hidden)


def test_tinyllava_compat_drops_the_first_of_siglips_patches(tmp_path: Path) -> None:
    save_hf(SiglipVisionModel(SiglipVisionConfig(**TINY, image_size=384)), tmp_path)
    whole = load_vision(f"hf:{tmp_path}", layer=-2)
    encoder = load_vision(f"hf:{tmp_path}", layer=-2, compat="tinyllava_siglip")
    assert encoder.num_tokens == 728
    assert torch.equal(encoder(picture(384)), whole(picture(384))[:, 1:])
    for name in ("ldp", "ldpv2", "pixel_shuffle"):
        with pytest.raises(ModelError, match=r"M513.*27x27.*got n=728"):
            fit_grid(PROJECTORS.build(name, 8, 16), encoder.grid, encoder.num_tokens)
    assert fit_grid(PROJECTORS.build("mlp2x_gelu", 8, 16), encoder.grid, encoder.num_tokens) == 728


def test_tinyllava_compat_is_refused_where_a_cls_token_is_dropped_already(tmp_path: Path) -> None:
    name = save(CLIP, tmp_path)
    with pytest.raises(ModelError, match=r"M545.*tinyllava_siglip.*1 prefix"):
        load_vision(name, compat="tinyllava_siglip")
    with pytest.raises(ModelError, match=r"M541.*did you mean 'tinyllava_siglip'"):
        load_vision(name, compat="tinyllava")


def spoil(folder: Path, prefix: str) -> None:
    """Change every tensor of a model directory whose name starts with `prefix`."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    assert any(prefix in k for k in tensors)
    save_file({k: v * 3 + 1 if prefix in k else v for k, v in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("key", LAST)
def test_the_last_layers_weights_reach_the_last_features_alone(tmp_path: Path, key: str) -> None:
    name, image = save(CASES[key], tmp_path), picture(CASES[key].size)
    before = [load_vision(name, layer=layer)(image) for layer in (-2, -1)]
    spoil(tmp_path, LAST[key])
    after = [load_vision(name, layer=layer)(image) for layer in (-2, -1)]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def blocks(encoder: Encoder, path: str) -> list[nn.Module]:
    """The blocks of an encoder of `LAST`, found by the path of its last one."""
    listed = path.removeprefix("visual.").rsplit(".", 2)[0]
    return list(encoder.backbone.get_submodule(listed).children())


@pytest.mark.parametrize("key", LAST)
def test_blocks_above_the_selected_layer_are_neither_kept_nor_run(tmp_path: Path, key: str) -> None:
    name, image, ran = save(CASES[key], tmp_path), picture(CASES[key].size), []
    for layer, count in ((-1, 3), (-2, 2), (-3, 1)):
        encoder = load_vision(name, layer=layer)
        for block in (kept := blocks(encoder, LAST[key])):
            block.register_forward_hook(lambda module, args, out: ran.append(1))
        ran.clear()
        encoder(image)
        assert (len(kept), len(ran)) == (count, count)


@pytest.mark.parametrize("key", LAST)
def test_a_layer_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, key: str) -> None:
    name = save(CASES[key], tmp_path)
    for layer in (-9, -4, 7):
        with pytest.raises(ModelError, match=rf"M545.*layer={layer}: the model has 3 layers.*-3 to -1"):
            load_vision(name, layer=layer)


def test_hidden_state_zero_is_no_layer(tmp_path: Path) -> None:
    name = save(CLIP, tmp_path)
    with pytest.raises(ModelError, match=r"M545.*layer=0"):
        load_vision(name, layer=0)
    assert torch.equal(load_vision(name, layer=2)(picture(32)), load_vision(name, layer=-2)(picture(32)))


def test_mean_and_std_must_be_known_and_can_be_given(tmp_path: Path) -> None:
    name = save(CLIP, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"M544.*vision.mean"):
        load_vision(name)
    encoder = load_vision(name, mean=(0.1, 0.2, 0.3), std=(1, 1, 1), image_size=48)
    assert (encoder.mean, encoder.image_size, encoder.grid) == ((0.1, 0.2, 0.3), 48, (6, 6))


def test_a_size_the_model_cannot_take_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"M549.*100x100 pixels.*patch size.*image_size"):
        load_vision("timm:test_vit", weights="random", image_size=100)


class Tokens(nn.Module):
    """Gives any number of tokens, and declares a class token or not."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, count, 4))


class Fake(Encoder):
    """An encoder of one's own, which settles itself by `probe`."""

    def __init__(self, count: int, prefix: int) -> None:
        super().__init__(Tokens(count), prefix, Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 8))
        self.probe()

    def features(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.backbone.tokens  # type: ignore[assignment]
        return tokens.expand(len(pixel_values), -1, -1)


@pytest.mark.parametrize(("count", "prefix"), [(17, 1), (16, 0), (21, 5)])
def test_declared_prefix_tokens_leave_a_square_grid(count: int, prefix: int) -> None:
    encoder = Fake(count, prefix)
    assert (encoder.grid, encoder.num_tokens) == ((4, 4), 16)
    assert torch.equal(encoder(picture(8)), encoder.backbone.tokens[:, prefix:])  # type: ignore[index]


@pytest.mark.parametrize(("count", "prefix"), [(17, 0), (15, 0), (21, 1), (1, 1)])
def test_tokens_that_fill_no_grid_are_refused(count: int, prefix: int) -> None:
    with pytest.raises(ModelError, match=rf"M512.*gives {count} tokens, {prefix} of them declared"):
        Fake(count, prefix)


def test_models_that_are_no_encoders_of_fixed_pictures_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModel, Siglip2VisionConfig

    text = LlamaConfig(**{k: v for k, v in TINY.items() if k != "patch_size"}, vocab_size=20)
    AutoModel.from_config(text).save_pretrained(tmp_path / "text")
    with pytest.raises(ModelError, match=r"M543.*no vision model.*pixel_values"):
        load_vision(f"hf:{tmp_path / 'text'}")
    AutoModel.from_config(Siglip2VisionConfig(**TINY, num_patches=16)).save_pretrained(tmp_path / "naflex")
    with pytest.raises(ModelError, match=r"M543.*needs pixel_attention_mask, spatial_shapes.*fixed-resolution"):
        load_vision(f"hf:{tmp_path / 'naflex'}")


def test_a_model_without_blocks_to_select_from_is_refused(tmp_path: Path) -> None:
    from transformers import MobileNetV2Config, MobileNetV2Model

    save_hf(MobileNetV2Model(MobileNetV2Config(image_size=32, depth_multiplier=0.25)), tmp_path)
    with pytest.raises(ModelError, match=r"M545.*MobileNetV2Model.*timm"):
        load_vision(f"hf:{tmp_path}")


def test_a_head_that_is_part_of_the_features_is_kept() -> None:
    encoder = empty_vision("timm:selecsls42")  # its forward_features ends in self.head
    assert encoder.width == encoder.backbone.num_features == 1280


def test_features_that_are_several_maps_are_refused() -> None:
    with pytest.raises(ModelError, match=r"M545.*feature maps.*layer=-2"):
        empty_vision("timm:efficientvim_m1")


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
    with pytest.raises(ModelError, match=r"M543.*did you mean 'vit_tiny_patch16_224.augreg_in21k'"):
        load_vision("timm:vit_tiny_patch16_224.augreg_in21")
    with pytest.raises(ModelError, match=r"M541.*names no source"):
        load_vision("vit_tiny_patch16_224")
    with pytest.raises(ModelError, match=r"M541.*did you mean 'open_clip'"):
        load_vision("openclip:ViT-B-32")


def test_a_timm_model_without_pretrained_weights_is_not_called_unreachable() -> None:
    with pytest.raises(ModelError, match=r"M543.*no pretrained weights of 'vit_giant_patch14_224'.*vision.weights"):
        load_vision("timm:vit_giant_patch14_224")


@pytest.mark.parametrize(
    "name",
    ["timm:hf-hub:nobody/none", "timm:test_vit", "open_clip:hf-hub:nobody/none", "open_clip:RN50:cc12m", "hf:no/one"],
)
def test_weights_that_cannot_be_fetched_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match=r"E420.*cannot be fetched"):
        load_vision(name)


def test_a_broken_directory_is_not_called_unreachable(tmp_path: Path) -> None:
    name = save(CLIP, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="M547"):
        load_vision(name)


def test_a_tuned_encoder_gives_a_graph_and_trains(tmp_path: Path) -> None:
    encoder = load_vision(save(CLIP, tmp_path), layer=-2).requires_grad_(True)
    encoder.train()
    encoder(picture(32)).sum().backward()
    assert encoder.backbone.training
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_frozen_batch_norm_does_not_move() -> None:
    encoder = load_vision("timm:test_efficientnet", weights="random")
    outer = nn.ModuleDict({"vision": encoder, "other": nn.Dropout()}).train()
    assert outer["other"].training
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder(picture(160))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
