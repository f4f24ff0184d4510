"""Frozen vision encoders of timm and transformers. Letters: i images, n tokens, d width, h w pixels, r c grid."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vlmpeft.encoder import Encoder, Pixels, VisionEncoder
from vlmpeft.errors import ModelError, nearest
from vlmpeft.sources import hub_or_cache, require_complete, resolve, unreachable
from vlmpeft.vision_weights import By, load_weights

__all__ = ["RANDOM", "Encoder", "TimmEncoder", "TransformersEncoder", "VisionEncoder", "empty_vision", "load_vision"]

RANDOM = "random"  # vision.weights=random: untrained weights, for smoke tests


class TimmEncoder(Encoder):
    """A timm model: its last feature map, or the output of a transformer block.

    Args:
        layer: -1 for the model's final features (after its final norm); -2, -3, ... for the output of an earlier block
            without the final norm, as LLaVA takes CLIP's `hidden_states[-2]`. Of a convolutional model, its stages.
    """

    def __init__(self, backbone: Any, layer: int, pixels: Pixels) -> None:
        super().__init__(backbone, int(getattr(backbone, "num_prefix_tokens", 0)), pixels)
        self.layer, self.channels_last = layer, getattr(backbone, "output_fmt", "NCHW") == "NHWC"  # Swin and its kin
        if layer != -1:
            self._check_layer(backbone)
        embed = getattr(backbone, "patch_embed", None)
        self.probe(getattr(embed, "grid_size", None) if layer == -1 else None)

    def _check_layer(self, backbone: Any) -> None:
        if not hasattr(backbone, "forward_intermediates"):
            raise ModelError("M545", f"{type(backbone).__name__} gives no inner layers.", "set vision.layer=-1.")
        count = len(getattr(backbone, "blocks", None) or backbone.feature_info)
        if not -count <= self.layer < count:
            reach = f"the model has {count} layers"
            raise ModelError("M545", f"vision.layer={self.layer}: {reach}.", f"use -{count} to -1.")

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder.features`."""
        if self.layer == -1:
            last: Tensor = self.backbone.forward_features(pixel_values)  # type: ignore[operator]
            return rearrange(last, "i r c d -> i d r c") if last.ndim == 4 and self.channels_last else last
        selected: list[Tensor] = self.backbone.forward_intermediates(  # type: ignore[operator]
            pixel_values, indices=[self.layer], norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return selected[0]


class TransformersEncoder(Encoder):
    """A Hugging Face vision transformer (CLIP, SigLIP, DINOv2): `hidden_states[layer]`, as LLaVA selects.

    Args:
        layer: index into the hidden states: -2 is the input of the last block, without the final norm. The blocks above
            it are dropped: they are neither run nor kept in memory.
    """

    def __init__(self, backbone: Any, layer: int, pixels: Pixels) -> None:
        super().__init__(backbone, _declared_prefix(backbone), pixels)
        self.layer = layer
        self.options: dict[str, Any] = {}
        if pixels.size != backbone.config.image_size and _accepts(backbone, "interpolate_pos_encoding"):
            self.options["interpolate_pos_encoding"] = True
        self.last = self._cut(backbone, layer)
        side = pixels.size // patch if (patch := getattr(backbone.config, "patch_size", 0)) else 0
        self.probe((side, side) if side else None)

    def _cut(self, backbone: Any, layer: int) -> list[nn.Module]:
        """Drop the blocks above the selected hidden state. Returns: the block that gives it, [] if none was cut."""
        blocks = _blocks(backbone)
        if blocks is None or layer == -1:
            return []
        count = len(blocks)  # there are count + 1 hidden states: the first is the input of block 0
        if not -count - 1 <= layer <= count:
            reach = f"the model has {count + 1} hidden states"
            raise ModelError("M545", f"vision.layer={layer}: {reach}.", f"use -{count + 1} to -1.")
        keep = layer % (count + 1)
        if keep in (0, count):
            return []
        del blocks[keep:]
        return [blocks[-1]]  # in a list, so that the block is not a submodule twice

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder.features`."""
        if not self.last:
            out = self.backbone(pixel_values=pixel_values, output_hidden_states=True, **self.options)
            hidden: tuple[Tensor, ...] = out.hidden_states
            return hidden[self.layer]
        caught: list[Any] = []
        with self.last[0].register_forward_hook(lambda module, args, output: caught.append(output)):
            self.backbone(pixel_values=pixel_values, **self.options)
        output = caught[0]
        return output if isinstance(output, Tensor) else output[0]


def _blocks(backbone: Any) -> nn.ModuleList | None:
    """The list of transformer blocks, by the length the configuration declares."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    lists = (m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


def _accepts(backbone: Any, argument: str) -> bool:
    return argument in inspect.signature(backbone.forward).parameters


def _declared_prefix(backbone: Any) -> int:
    """Tokens before the patches: a class embedding or CLS token if the model has one, and its registers."""
    names = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_parameters()}
    registers = int(getattr(backbone.config, "num_register_tokens", 0)) if "register_tokens" in names else 0
    return int("class_embedding" in names or "cls_token" in names) + registers


def load_vision(
    name: str,
    *,
    layer: int = -1,
    weights: str | None = None,
    weights_by: By = "name",
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Encoder:
    """Build a frozen encoder from `timm:NAME` or `hf:NAME_OR_DIR`.

    Args:
        weights: None takes the pretrained ones of the name, "random" none at all, else a file (`package:` allowed).
        weights_by: match tensors by "name", or by "order" with every shape checked.
        image_size, mean, std: override what the model declares.

    Raises: ModelError M541 for an unknown source, M542 for weights that do not fit, M545 for a layer that is not there;
        EnvironmentFault E420 for weights that are not to be had.
    """
    source, _, rest = name.partition(":")
    if source not in ("timm", "hf"):
        raise ModelError("M541", f"vision.name '{name}' names no source.", "write timm:NAME or hf:NAME_OR_DIR.")
    with hub_or_cache():
        backbone, declared = (_timm if source == "timm" else _transformers)(rest, weights, weights_by, image_size)
    found = (mean or declared.get("mean"), std or declared.get("std"), image_size or declared.get("size"))
    if None in found:
        unknown = f"{name} does not declare its pixel mean, std and image size."
        raise ModelError("M544", unknown, "set vision.mean=[r,g,b] vision.std=[r,g,b] vision.image_size=N.")
    pixels = Pixels(tuple(found[0]), tuple(found[1]), int(found[2]))  # type: ignore[arg-type]
    kind = TimmEncoder if source == "timm" else TransformersEncoder
    return kind(backbone.eval(), layer, pixels).requires_grad_(False).eval()


def _timm(name: str, weights: str | None, by: By, image_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """A timm model without its classifier. Returns: model, what it declares of mean, std and size."""
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(name.split(".")[0]):
        known = difflib.get_close_matches(name, timm.list_models(), n=8)
        raise ModelError("M543", f"timm has no model '{name}'{nearest(name, known)}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same ones wherever the model is loaded again
            backbone = _create(name, weights is None, image_size)
    except (OSError, RuntimeError) as error:
        raise unreachable(f"timm:{name}", error) from error
    if weights not in (None, RANDOM):
        load_weights(backbone, Path(resolve(str(weights))), by)
    if hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(0)  # type: ignore[operator]
    data = resolve_model_data_config(backbone)
    return backbone, {"mean": data["mean"], "std": data["std"], "size": data["input_size"][-1]}


def _create(name: str, pretrained: bool, image_size: int | None) -> nn.Module:
    import timm

    if image_size is not None:
        try:
            return timm.create_model(name, pretrained=pretrained, img_size=image_size)
        except TypeError:  # convolutional models take any size and have no such argument
            pass
    return timm.create_model(name, pretrained=pretrained)


def _transformers(name: str, weights: str | None, by: By, image_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """A vision transformer of a hub id or directory. Returns: model, what it declares of mean, std and size."""
    from transformers import AutoConfig, AutoModel

    source = resolve(name)
    try:
        if weights is None:
            model, info = AutoModel.from_pretrained(source, trust_remote_code=False, output_loading_info=True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, info = AutoModel.from_config(AutoConfig.from_pretrained(source, trust_remote_code=False)), None
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error
    backbone = getattr(model, "vision_model", model)
    if info is not None:
        require_complete(name, info, "" if backbone is model else "vision_model.")
    elif weights != RANDOM:
        load_weights(backbone, Path(resolve(str(weights))), by)
    processor = _processor(source)
    size = getattr(backbone.config, "image_size", None)
    return backbone, {"mean": processor.get("image_mean"), "std": processor.get("image_std"), "size": size}


def _processor(source: str) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        return {}
    return values


def empty_vision(name: str, *, layer: int = -1, image_size: int | None = None) -> Encoder:
    """The architecture of an encoder on the meta device: shapes without weights, from its configuration alone.

    Args: as `load_vision`.
    """
    unseen = (0.5, 0.5, 0.5)  # no pixel is ever fed, so the encoder need not declare its mean and std
    with torch.device("meta"):
        return load_vision(name, layer=layer, weights=RANDOM, image_size=image_size, mean=unseen, std=unseen)
