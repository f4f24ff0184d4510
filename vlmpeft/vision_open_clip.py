"""Encoders of open_clip: its own vision transformers and ResNets, and the timm models it wraps.

Letters: i images, n tokens, d width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft.encoder import Encoder, Loaded, Pixels, layer_index, triple, unknown_model
from vlmpeft.errors import EnvironmentFault, ModelError, nearest
from vlmpeft.sources import unreachable
from vlmpeft.vision_timm import TimmEncoder, resize
from vlmpeft.vision_weights import By, load_weights

LOCAL, HUB = "local-dir:", "hf-hub:"  # names that open_clip looks up outside its own list
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")  # of open_clip's ResNet


class OpenClipEncoder(Encoder):
    """A vision tower of open_clip's own: a block of its transformer, a stage of its ResNet.

    Args:
        layer: -1 for the last one, with the final norm where open_clip norms its tokens; -2, -3, ... or 0, 1, ... for
            an earlier one, without it. What lies above is dropped.
    """

    def __init__(self, backbone: Any, layer: int, pixels: Pixels) -> None:
        super().__init__(backbone, int(hasattr(backbone, "class_embedding")), pixels)
        self.layer = layer
        blocks = backbone.transformer.resblocks if hasattr(backbone, "transformer") else STAGES
        self.index = layer_index(layer, len(blocks))
        self.norm = layer == -1 and _norms_tokens(backbone)
        if blocks is STAGES:
            _cut_resnet(backbone, self.index)
        else:
            backbone.prune_intermediate_layers([self.index], prune_norm=not self.norm, prune_head=True)
            backbone.attn_pool = None
        self.probe()

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder.features`."""
        found: dict[str, list[Tensor]] = self.backbone.forward_intermediates(  # type: ignore[operator]
            pixel_values, indices=[self.index], normalize_intermediates=self.norm, intermediates_only=True
        )
        return found["image_intermediates"][0]


def open_clip_encoder(backbone: Any, layer: int, pixels: Pixels) -> Encoder:
    """The encoder of a vision tower: of the timm model inside, if it wraps one."""
    if hasattr(backbone, "trunk"):
        return TimmEncoder(backbone.trunk, layer, pixels)
    return OpenClipEncoder(backbone, layer, pixels)


def _norms_tokens(backbone: Any) -> bool:
    """Whether `ln_post` is of the tokens and not of what is pooled from them, as in VisionTransformer._pool."""
    return hasattr(backbone, "ln_post") and backbone.attn_pool is None and not backbone.final_ln_after_pool


def _cut_resnet(backbone: Any, index: int) -> None:
    backbone.attnpool = None
    for stage in STAGES[index + 1 :]:
        setattr(backbone, stage, nn.Identity())


def load_open_clip(name: str, *, pretrained: bool, file: Path | None, by: By, image_size: int | None) -> Loaded:
    """The vision tower of `ARCHITECTURE:TAG`, `hf-hub:ID` or `local-dir:DIR`.

    Args: pretrained: with the weights of the name. file: weights of one's own. image_size: side to interpolate to.
    Raises: ModelError M542, M543; EnvironmentFault E411, E420.
    """
    try:
        import open_clip
    except ImportError as error:
        missing = "open_clip encoders need the package open_clip_torch, which is not installed."
        raise EnvironmentFault("E411", missing, "pip install open_clip_torch") from error
    listed = not name.startswith((LOCAL, HUB))
    architecture, tag = _split(name, pretrained) if listed else (name, None)
    declared = _declared(architecture, tag) if listed else {}
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(0)  # random weights are the same ones wherever the model is loaded again
            model = open_clip.create_model(
                architecture, pretrained=tag if pretrained else None, load_weights=pretrained, pretrained_text=False,
                require_pretrained=pretrained, force_quick_gelu=bool(declared.get("quick_gelu")),
                device=torch.get_default_device(),
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        raise unreachable(name.removeprefix(LOCAL), error) from error
    visual: Any = model.visual
    declared = declared if listed else visual.preprocess_cfg
    if file is not None:
        load_weights(visual, file, by)
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    if image_size not in (None, size):
        _resize(visual, int(image_size or size))
    return Loaded(visual, triple(declared.get("mean")), triple(declared.get("std")), int(size))


def _split(name: str, pretrained: bool) -> tuple[str, str | None]:
    """Architecture and tag of a name such as `ViT-B-32:laion2b_s34b_b79k`. Raises: ModelError M543."""
    import open_clip

    architecture, _, tag = name.partition(":")
    architecture = architecture.replace("/", "-")  # open_clip itself takes ViT-B/32 for ViT-B-32
    if architecture not in open_clip.list_models():
        raise unknown_model("open_clip", architecture, open_clip.list_models())
    tags: list[str] = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and not open_clip.is_pretrained_cfg(architecture, tag):
        raise ModelError("M543", f"open_clip has no weights '{tag}' of {architecture}{nearest(tag, tags)}")
    if pretrained and not tag and len(tags) != 1:
        several = f"open_clip has {len(tags)} pretrained weights of {architecture} ({', '.join(tags) or 'none'})."
        raise ModelError("M543", several, f"write open_clip:{architecture}:TAG, or set vision.weights=FILE.")
    return architecture, tag or (tags[0] if len(tags) == 1 else None)


def _declared(architecture: str, tag: str | None) -> dict[str, Any]:
    """What a tag declares of its pixels; without a tag, what all tags of the architecture agree on."""
    import open_clip

    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(architecture)
    found = [open_clip.get_pretrained_cfg(architecture, t) for t in tags]
    return {k: v for k, v in found[0].items() if all(f.get(k) == v for f in found)} if found else {}


def _resize(visual: Any, image_size: int) -> None:
    """Interpolate the position embeddings of a tower to another side."""
    from open_clip.model import resize_pos_embed

    if hasattr(visual, "trunk"):
        resize(visual.trunk, image_size)
    elif hasattr(visual, "grid_size"):
        visual.grid_size = tuple(image_size // patch for patch in visual.patch_size)
        state = {"visual.positional_embedding": visual.positional_embedding.detach()}
        resize_pos_embed(state, SimpleNamespace(visual=visual))
        visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's log lines: no weights loaded where none are wanted, errors that it raises besides."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
