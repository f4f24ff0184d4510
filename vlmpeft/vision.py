"""Frozen vision encoders in one line, from timm, open_clip and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlmpeft.encoder import RANDOM, TINYLLAVA_SIGLIP, Encoder, Loaded, Pixels, Triple, VisionEncoder
from vlmpeft.errors import ModelError, nearest
from vlmpeft.sources import hub_or_cache, resolve
from vlmpeft.vision_open_clip import load_open_clip, open_clip_encoder
from vlmpeft.vision_timm import TimmEncoder, load_timm
from vlmpeft.vision_transformers import TransformersEncoder, load_transformers
from vlmpeft.vision_weights import By

__all__ = ["RANDOM", "Encoder", "VisionEncoder", "empty_vision", "load_vision"]

Load = Callable[..., Loaded]
Make = Callable[[Any, int, Pixels], Encoder]
SOURCES: dict[str, tuple[Load, Make]] = {
    "timm": (load_timm, TimmEncoder),
    "open_clip": (load_open_clip, open_clip_encoder),
    "hf": (load_transformers, TransformersEncoder),
}


def load_vision(
    name: str,
    *,
    layer: int = -1,
    weights: str | None = None,
    weights_by: By = "name",
    image_size: int | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
    compat: str | None = None,
) -> Encoder:
    """Build a frozen encoder from `timm:NAME`, `open_clip:NAME:TAG` or `hf:NAME_OR_DIR`.

    Args:
        layer: -2 is the block before the last, without the final norm, as LLaVA selects; -1 is the library's own last
            features. Blocks above the selected one are dropped.
        weights: None takes the pretrained ones of the name, "random" none at all, else a file (`package:` allowed).
        weights_by: match tensors by "name", or by "order" with every shape checked.
        image_size, mean, std: override what the model declares; position embeddings are interpolated.
        compat: "tinyllava_siglip" leaves out the first patch.

    Raises: ModelError M541 for an unknown source or compat, M542 for weights that do not fit, M543 for an unknown name,
        M544 for pixels it does not declare, M545 for a layer that is not there, M549 for an image size it does not
        take; EnvironmentFault E411 without open_clip, E420 for weights that are not to be had.
    """
    source, _, rest = name.partition(":")
    if source not in SOURCES:
        hint = nearest(source, SOURCES)
        raise ModelError("M541", f"vision.name '{name}' names no source{hint}", "write timm:NAME or hf:NAME_OR_DIR.")
    if compat not in (None, TINYLLAVA_SIGLIP):
        raise ModelError("M541", f"no vision.compat '{compat}'{nearest(str(compat), [TINYLLAVA_SIGLIP])}")
    load, make = SOURCES[source]
    file = None if weights in (None, RANDOM) else Path(resolve(str(weights)))
    with hub_or_cache():
        loaded = load(rest, pretrained=weights is None, file=file, by=weights_by, image_size=image_size)
    pixels = _pixels(name, mean or loaded.mean, std or loaded.std, image_size or loaded.size)
    encoder = make(loaded.backbone.eval(), layer, pixels).requires_grad_(False).eval()
    if compat == TINYLLAVA_SIGLIP:
        encoder.drop_first_patch()
    return encoder


def _pixels(name: str, mean: Triple | None, std: Triple | None, size: int | None) -> Pixels:
    if mean is None or std is None or size is None:
        unknown = f"{name} does not declare its pixel mean, std and image size."
        raise ModelError("M544", unknown, "set vision.mean=[r,g,b] vision.std=[r,g,b] vision.image_size=N.")
    return Pixels(mean, std, size)


def empty_vision(name: str, *, layer: int = -1, image_size: int | None = None, compat: str | None = None) -> Encoder:
    """The architecture of an encoder on the meta device: shapes without weights, from its configuration alone.

    Args: as `load_vision`.
    """
    unseen = (0.5, 0.5, 0.5)  # no pixel is ever fed, so the encoder need not declare its mean and std
    with torch.device("meta"):
        return load_vision(
            name, layer=layer, weights=RANDOM, image_size=image_size, mean=unseen, std=unseen, compat=compat
        )
