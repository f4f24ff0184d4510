"""Encoders of timm: vision transformers, EVA, ConvNeXt, Swin and every network with a feature map.

Letters: i images, n tokens, d width, r c grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vlmpeft.encoder import Encoder, Loaded, Pixels, layer_index, triple, unknown_model
from vlmpeft.errors import ModelError
from vlmpeft.sources import unreachable
from vlmpeft.vision_weights import By, load_weights

ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # names that timm looks up outside its own list


class TimmEncoder(Encoder):
    """A timm model: its last features, or the output of an inner layer.

    Args:
        layer: -1 for the model's own last features, after its final norm; -2, -3, ... or 0, 1, ... for the output of
            a block, without the final norm, as LLaVA takes CLIP's `hidden_states[-2]`. Of a hierarchical or
            convolutional model, of a stage. The layers above are dropped.
    """

    def __init__(self, backbone: Any, layer: int, pixels: Pixels) -> None:
        super().__init__(backbone, int(getattr(backbone, "num_prefix_tokens", 0)), pixels)
        self.layer, self.channels_last = layer, getattr(backbone, "output_fmt", "NCHW") == "NHWC"  # Swin and its kin
        embed = getattr(backbone, "patch_embed", None)
        if layer == -1:
            _drop_head(self)
            self.probe(getattr(embed, "grid_size", None))
        else:
            self.index = _cut(backbone, layer)
            self.probe()

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder.features`."""
        if self.layer == -1:
            last = self.backbone.forward_features(pixel_values)  # type: ignore[operator]
            if not isinstance(last, Tensor):
                several = f"{type(self.backbone).__name__} ends in {len(last)} feature maps."
                raise ModelError("M545", several, "set vision.layer=-2, which takes one.")
            return rearrange(last, "i r c d -> i d r c") if last.ndim == 4 and self.channels_last else last
        selected: list[Tensor] = self.backbone.forward_intermediates(  # type: ignore[operator]
            pixel_values, indices=[self.index], norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return selected[0]


def _drop_head(encoder: Encoder) -> None:
    """Drop the classifier, and of head, norm and pooling before it what `forward_features` does not run."""
    backbone: Any = encoder.backbone
    if hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(0)
    ran = {name.split(".")[0] for name in encoder.run_order()}
    for name in ("head", "fc_norm", "attn_pool"):
        if name not in ran and isinstance(getattr(backbone, name, None), nn.Module):
            setattr(backbone, name, nn.Identity())


def _cut(backbone: Any, layer: int) -> int:
    """Drop what lies above the selected layer. Returns: its index."""
    if not hasattr(backbone, "prune_intermediate_layers"):
        raise ModelError("M545", f"{type(backbone).__name__} gives no inner layers.", "set vision.layer=-1.")
    index = layer_index(layer, len(backbone.feature_info))
    backbone.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
    return index


def load_timm(name: str, *, pretrained: bool, file: Path | None, by: By, image_size: int | None) -> Loaded:
    """A timm model by name, `hf-hub:ID` or `local-dir:DIR`.

    Args: pretrained: with the weights of the name. file: weights of one's own. image_size: side to interpolate to.
    Raises: ModelError M542, M543; EnvironmentFault E420.
    """
    import timm
    from timm.data.config import resolve_model_data_config

    if not name.startswith(ELSEWHERE):
        _check_name(name, pretrained)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same ones wherever the model is loaded again
            backbone = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError, ValueError) as error:
        raise unreachable(name.removeprefix("local-dir:"), error) from error
    data = resolve_model_data_config(backbone)
    if file is not None:
        load_weights(backbone, file, by, optional=_classifier(backbone))
    if image_size is not None:
        resize(backbone, image_size)
    return Loaded(backbone, triple(data["mean"]), triple(data["std"]), int(data["input_size"][-1]))


def resize(backbone: Any, image_size: int) -> None:
    """Interpolate the position embeddings of a model that has them; the probe tells whether the others take the size.

    Raises: ModelError M549 if its patches or windows do not fit.
    """
    if not hasattr(backbone, "set_input_size"):
        return
    try:
        backbone.set_input_size(img_size=(image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        refusal = f"{type(backbone).__name__} cannot be set to {image_size}x{image_size} pixels: {error}"
        raise ModelError("M549", refusal, "set vision.image_size to a multiple of its patches.") from error


def _check_name(name: str, pretrained: bool) -> None:
    """Refuse what timm does not list. Raises: ModelError M543."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise unknown_model("timm", name, timm.list_models())
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in timm.models.get_arch_pretrained_cfgs(name):
        raise unknown_model("timm", name, tagged)
    if pretrained and not timm.is_model_pretrained(name):
        missing = f"timm has no pretrained weights of '{name}'."
        raise ModelError("M543", missing, f"write one of {', '.join(tagged) or 'its kin'}, or set vision.weights=FILE.")


def _classifier(backbone: nn.Module) -> tuple[str, ...]:
    """Names of the layers of the classifier, which an encoder does not need."""
    declared = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return (declared,) if isinstance(declared, str) else tuple(declared)
