"""Tiny encoders of every family with random weights, as directories that the three libraries read, and their features
computed by those libraries alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
MLP = {**SIZES, "intermediate_size": 24}
STAGES: dict[str, Any] = {"hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 2, 1]}
VIT: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": 2}
TEXT = {"context_length": 8, "vocab_size": 40, "width": 8, "heads": 2, "layers": 1}


@dataclass(frozen=True)
class Case:
    """One architecture. At `size` pixels its last layer gives `grid` x `grid` tokens of `width` after `prefix` others.

    name: class, timm architecture or kind of open_clip tower. other: a second size, with `other_grid`.
    """

    source: str
    name: str
    options: dict[str, Any]
    size: int
    grid: int
    width: int
    other: int
    other_grid: int
    prefix: int = 0
    channels_last: bool = False  # of timm's forward_features
    unused: tuple[str, ...] = field(default=())  # tensors that no layer of the model reads


def hf(name: str, options: dict[str, Any], *, width: int = 16, **changes: Any) -> Case:
    values: dict[str, Any] = {"size": 32, "grid": 4, "width": width, "other": 48, "other_grid": 6}
    return Case("hf", name, options, **{**values, **changes})


def tm(name: str, options: dict[str, Any], *, width: int = 16, **changes: Any) -> Case:
    values: dict[str, Any] = {"size": 64, "grid": 4, "width": width, "other": 96, "other_grid": 6}
    return Case("timm", name, options, **{**values, **changes})


CASES: dict[str, Case] = {
    "clip": hf("CLIPVisionModel", {**MLP, "patch_size": 8}, prefix=1),
    "siglip": hf("SiglipVisionModel", {**MLP, "patch_size": 8}),
    "dinov2": hf("Dinov2Model", {**SIZES, "patch_size": 8, "mlp_ratio": 2}, prefix=1, unused=("mask_token",)),
    "dinov2_registers": hf(
        "Dinov2WithRegistersModel", {**SIZES, "patch_size": 8, "mlp_ratio": 2, "num_register_tokens": 3},
        prefix=4, unused=("mask_token",),
    ),
    "dinov3": hf(
        "DINOv3ViTModel", {**MLP, "patch_size": 8, "num_register_tokens": 4}, prefix=5, unused=("mask_token",)
    ),
    "vit": hf("ViTModel", {**MLP, "patch_size": 8}, prefix=1),
    "hf_convnext": hf("ConvNextModel", STAGES, size=64, grid=2, other=96, other_grid=3),
    "hf_swin": hf(
        "SwinModel", {"patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 2},
        width=32,
    ),
    "hf_resnet": hf("ResNetModel", {**STAGES, "embedding_size": 4}, size=64, grid=2, other=96, other_grid=3),
    "timm_vit": tm("vit_tiny_patch16_224", VIT, prefix=1),
    "timm_clip": tm("vit_base_patch16_clip_224", VIT, prefix=1),
    "timm_siglip": tm("vit_base_patch16_siglip_224", VIT),
    "timm_dinov2_registers": tm("vit_small_patch14_reg4_dinov2", VIT, size=56, other=84, prefix=5),
    "eva02": tm("eva02_tiny_patch14_224", VIT, size=56, other=84, prefix=1),
    "timm_dinov3": tm("vit_tiny_patch16_dinov3_qkvb", VIT, prefix=5),
    "convnext": tm("convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [4, 8, 8, 16]}, grid=2, other_grid=3),
    "swin": tm(
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 1, 2], "window_size": 4}, width=32, channels_last=True,
    ),
    "efficientnet": tm("test_efficientnet", {}, width=256, grid=2, other_grid=3),
    "resnet": tm("test_resnet", {}, width=96, grid=2, other_grid=3),
    "mambaout": tm("test_mambaout", {}, width=64, grid=2, other_grid=3, channels_last=True),
    "open_clip_vit": Case(
        "open_clip", "vit", {"layers": 3, "width": 16, "head_width": 8, "patch_size": 8}, 32, 4, 16, 48, 6, prefix=1
    ),
    "open_clip_resnet": Case(
        "open_clip", "resnet", {"layers": [1, 1, 1, 1], "width": 4, "head_width": 8}, 64, 2, 128, 96, 3
    ),
    "open_clip_timm": Case(
        "open_clip", "timm", {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
        160, 10, 64, 96, 6, prefix=1,
    ),
}  # fmt: skip


def scatter(model: nn.Module) -> nn.Module:
    """Give every weight a value of its own: norms, layer scales and biases start at 0 or 1, where faults hide."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def save(case: Case, folder: Path) -> str:
    """Write an encoder with weights. Returns: the name `load_vision` finds it under."""
    torch.manual_seed(0)
    writers: dict[str, Callable[[Case, Path], str]] = {"hf": _save_hf, "timm": _save_timm, "open_clip": _save_open_clip}
    return writers[case.source](case, folder)


def _save_hf(case: Case, folder: Path) -> str:
    import transformers

    cls = getattr(transformers, case.name)
    model = cls(cls.config_class(image_size=case.size, **case.options))
    scatter(model).save_pretrained(folder)  # type: ignore[operator]
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD, "size": {"height": case.size, "width": case.size}})
    )
    return f"hf:{folder}"


def _save_timm(case: Case, folder: Path) -> str:
    import timm
    from safetensors.torch import save_file

    sized = {"img_size": case.size} if hasattr(timm.create_model(case.name, **case.options), "set_input_size") else {}
    arguments = {**case.options, **sized}
    model = scatter(timm.create_model(case.name, **arguments))
    declared = {**model.pretrained_cfg, "input_size": [3, case.size, case.size], "mean": MEAN, "std": STD}
    keep = {k: declared[k] for k in ("input_size", "mean", "std", "classifier", "first_conv")}
    keep["num_classes"] = model.num_classes
    config = {"architecture": case.name, "num_classes": model.num_classes, "pretrained_cfg": keep}
    config["model_args"] = arguments
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return f"timm:local-dir:{folder}"


def _save_open_clip(case: Case, folder: Path) -> str:
    import open_clip
    from safetensors.torch import save_file

    towers = {"embed_dim": 8, "vision_cfg": {"image_size": case.size, **case.options}, "text_cfg": TEXT}
    config = {"model_cfg": towers, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = scatter(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


def reference(case: Case, folder: Path, layer: int, pixels: Tensor) -> Tensor:
    """(i, 3, h, w) -> (i, n, d): what the library itself gives, uncut, less the prefix tokens."""
    with torch.no_grad():
        found = {"hf": _of_hf, "timm": _of_timm, "open_clip": _of_open_clip}[case.source](case, folder, layer, pixels)
    return rearrange(found, "i d r c -> i (r c) d") if found.ndim == 4 else found[:, case.prefix :]


def _of_hf(case: Case, folder: Path, layer: int, pixels: Tensor) -> Tensor:
    import transformers

    model = getattr(transformers, case.name).from_pretrained(folder).eval()
    resized = {} if pixels.shape[-1] == case.size else {"interpolate_pos_encoding": True}
    if "dino" in case.name.lower() or case.name in ("ConvNextModel", "ResNetModel"):
        resized = {}  # these take every size as they are
    states: tuple[Tensor, ...] = model(pixel_values=pixels, output_hidden_states=True, **resized).hidden_states
    return states[layer]


def _of_timm(case: Case, folder: Path, layer: int, pixels: Tensor) -> Tensor:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return timm_features(model, layer, pixels, case.channels_last)


def timm_features(model: Any, layer: int, pixels: Tensor, channels_last: bool) -> Tensor:
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=tuple(pixels.shape[-2:]))
    if layer == -1:
        last: Tensor = model.forward_features(pixels)
        return rearrange(last, "i r c d -> i d r c") if channels_last else last
    inner: list[Tensor] = model.forward_intermediates(pixels, indices=[layer], norm=False, intermediates_only=True)
    return inner[0]


def _of_open_clip(case: Case, folder: Path, layer: int, pixels: Tensor) -> Tensor:
    import open_clip

    sized = {} if case.name == "resnet" else {"force_image_size": pixels.shape[-1]}
    visual: Any = open_clip.create_model(f"local-dir:{folder}", **sized).eval().visual
    if case.name == "timm":
        return timm_features(visual.trunk, layer, pixels, case.channels_last)
    if case.name == "vit" and layer == -1:
        caught: list[Tensor] = []
        visual.transformer.register_forward_hook(lambda m, a, out: caught.append(out))
        visual(pixels)
        normed: Tensor = visual.ln_post(caught[0])
        return normed
    found: list[Tensor] = visual.forward_intermediates(pixels, indices=[layer], intermediates_only=True)[
        "image_intermediates"
    ]
    return found[0]
