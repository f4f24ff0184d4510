"""Encoders of transformers: CLIP, SigLIP, DINOv2, DINOv3, ViT and hierarchical or convolutional vision models.

Letters: i images, n tokens, d width.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmpeft.encoder import MARK, Encoder, Loaded, Pixels, layer_index, triple
from vlmpeft.errors import ModelError
from vlmpeft.llava_layout import HALVES, KINDS
from vlmpeft.sources import quiet, require_complete, resolve, unreachable
from vlmpeft.vision_weights import By, Misfit, load_weights, read_weights

PREFIX = ("class_embedding", "cls_token", "distillation_token")  # parameters that are one token before the patches


class TransformersEncoder(Encoder):
    """A vision model of transformers: `hidden_states[layer]`, as LLaVA selects.

    Args:
        layer: index into the hidden states: -1 is the output of the last block and -2 that of the block before it, both
            without the final norm. What runs after that block is dropped: later blocks, norm, pooling.
    """

    def __init__(self, backbone: Any, layer: int, pixels: Pixels) -> None:
        super().__init__(backbone, _declared_prefix(backbone), pixels)
        self.layer = layer
        self.options: dict[str, Any] = {}
        if pixels.size != _side(backbone.config, "image_size") and "interpolate_pos_encoding" in _arguments(backbone):
            self.options["interpolate_pos_encoding"] = True
        blocks = _blocks(backbone)
        index = layer_index(layer, len(blocks), first=1)
        self.last = [blocks[index]]  # in a list, so that the block is not a submodule twice
        later = _later(self, blocks[index])
        del blocks[index + 1 :]
        _skip(backbone, later)
        self.probe()

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder.features`."""
        caught: list[Any] = []
        with self.last[0].register_forward_hook(lambda module, args, output: caught.append(output)):
            self.backbone(pixel_values=pixel_values, **self.options)
        output = caught[0]
        return output if isinstance(output, Tensor) else output[0]


class Passed(nn.Module):
    """Stands where a module was that runs after the selected block: gives back what it gets."""

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """First argument, unchanged."""
        return hidden


def _later(encoder: Encoder, block: nn.Module) -> list[str]:
    """Names of the modules that run only after `block`, seen by running one blank image through the backbone."""
    order = encoder.run_order(mark=block)
    left = order.index(MARK)
    before = set(order[:left])
    return [name for name in order[left + 1 :] if name not in before]


def _skip(backbone: nn.Module, later: list[str]) -> None:
    """Take modules out of the backbone, outermost first; blocks that have been cut are no longer there."""
    for name in later:
        if name in dict(backbone.named_modules()):
            backbone.set_submodule(name, Passed())


def _blocks(backbone: Any) -> nn.ModuleList:
    """The list of blocks or stages, by the number the configuration declares. Raises: ModelError M545."""
    count = getattr(backbone.config, "num_hidden_layers", None) or len(getattr(backbone.config, "depths", ()))
    found = next((m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if found is None:
        unknown = f"{type(backbone).__name__} shows no list of {count} blocks to select a layer of."
        raise ModelError("M545", unknown, "take the encoder from timm or open_clip.")
    return found


def _arguments(backbone: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(backbone.forward).parameters)


def _declared_prefix(backbone: Any) -> int:
    """Tokens before the patches: those the model has a parameter for, and its registers."""
    names = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_parameters()}
    registers = int(getattr(backbone.config, "num_register_tokens", 0)) if "register_tokens" in names else 0
    return sum(name in names for name in PREFIX) + registers


def load_transformers(name: str, *, pretrained: bool, file: Path | None, by: By, image_size: int | None) -> Loaded:
    """The vision model of a hub id or directory; of a model of images and text, its vision half alone.

    Args: pretrained: with the weights of the name. file: weights of one's own. image_size: positions are interpolated
        in every forward, so nothing is done here.
    Raises: ModelError M542, M543, M547, M548; EnvironmentFault E420.
    """
    from transformers import AutoConfig, AutoModel

    source = resolve(name)
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
        half = {"key_mapping": HALVES["vision"]} if config.model_type in KINDS else {}
        config = getattr(config, "vision_config", config)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)  # random weights are the same ones wherever the model is loaded again
            if pretrained:
                model, info = AutoModel.from_pretrained(
                    source, config=config, trust_remote_code=False, output_loading_info=True,
                    ignore_mismatched_sizes=True, **half,
                )  # fmt: skip
                require_complete(name, info)
            else:
                model = AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error
    if file is not None:
        model = _with_weights(model, file, by)
    backbone = getattr(model, "vision_model", model)
    _refuse_what_takes_more_than_pixels(name, backbone)
    processor = _processor(source)
    size = _side(backbone.config, "image_size") or _side(processor, "crop_size") or _side(processor, "size")
    return Loaded(backbone, triple(processor.get("image_mean")), triple(processor.get("image_std")), size)


def _with_weights(model: Any, file: Path, by: By) -> Any:
    """A model like `model` with a file's weights; by name, transformers finds them under its older names too."""
    if by == "order":
        load_weights(model, file, by)
        return model
    with quiet():
        loaded, info = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(read_weights(file)), output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    children = dict(getattr(model, "vision_model", model).named_children())
    extra = [k for k in info["unexpected_keys"] if k.removeprefix("vision_model.").split(".")[0] in children]
    Misfit(sorted(info["missing_keys"]), sorted(extra), sorted(info["mismatched_keys"])).refuse(file)
    return loaded


def _refuse_what_takes_more_than_pixels(name: str, backbone: Any) -> None:
    """Raises: ModelError M543 for a model without pixels, or one that must be told the shape of every image."""
    arguments = _arguments(backbone)
    if "pixel_values" not in arguments:
        raise ModelError("M543", f"'{name}' is no vision model: {type(backbone).__name__} takes no pixel_values.")
    empty, several = inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD
    others = [k for k, p in arguments.items() if p.default is empty and p.kind != several and k != "pixel_values"]
    if others:
        needs = f"'{name}' ({type(backbone).__name__}) takes images of many shapes and needs {', '.join(others)}."
        raise ModelError("M543", needs, "take a fixed-resolution variant, such as google/siglip2-base-patch16-224.")


def _processor(source: str) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        return {}
    return values


def _side(values: Any, key: str) -> int | None:
    """A side in pixels, which configurations give as a number, a pair or a mapping; None if they give none."""
    found = values.get(key) if isinstance(values, dict) else getattr(values, key, None)
    if isinstance(found, dict):
        found = found.get("height", found.get("shortest_edge"))
    if isinstance(found, list | tuple):
        found = found[0]
    return int(found) if found else None
