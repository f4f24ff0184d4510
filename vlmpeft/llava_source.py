"""A LLaVA or LLaVA-NeXT of transformers as a start, `init=hf:DIR_OR_ID`: what it decides of a recipe, its projector.

Its halves are loaded as any other encoder and language model, `vision=hf:DIR_OR_ID` and `language=DIR_OR_ID`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlmpeft.encoder import TINYLLAVA_SIGLIP
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.llava_layout import HUB, KINDS, NEXT, new_name
from vlmpeft.sections import Plain
from vlmpeft.sources import hub_or_cache, local_directory, resolve, unreachable

HF = "hf:"
PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}  # tokens before the patches, by a tower's type
PROJECTOR = "projector."


def decided_by(init: object) -> Plain:
    """The values of a recipe that a start decides, as plain sections; none for a model directory of ours.

    Raises: ModelError M572 for a model that our parts cannot be; M547, EnvironmentFault E420 as any other weights.
    """
    if not isinstance(init, str) or not init.startswith(HF):
        return {}
    from transformers import AutoConfig

    name = init.removeprefix(HF)
    source = resolve(name)
    try:
        with hub_or_cache():
            config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error
    if config.model_type not in KINDS:
        raise _other(init, f"is a {config.model_type} model")
    tower = config.vision_config
    if tower.model_type not in PREFIX:
        raise _other(init, f"has the encoder {tower.model_type}")
    if not isinstance(config.vision_feature_layer, int):
        raise _other(init, f"joins the layers {list(config.vision_feature_layer)} of its encoder")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise _other(init, "has another projector than two linear layers with biases and GELU between them")
    if getattr(config, "quantization_config", None) is not None:
        raise _other(init, "is quantised")
    vision = {"name": init, "layer": config.vision_feature_layer, "compat": _compat(init, config)}
    data: Plain = {"tile_merge": "flat"}
    if config.model_type == NEXT:
        tiles = [_grid(init, pinpoint, tower.image_size) for pinpoint in config.image_grid_pinpoints]
        data = {"tile_merge": "spatial_unpad", "image_mode": "anyres", "tiles": tiles}
    return {"vision": vision, "language": {"name": name}, "projector": {"name": "mlp2x_gelu"}, "data": data}


def check_decided(values: Mapping[str, Any], decided: Mapping[str, Any], where: str = "") -> None:
    """Raise ConfigError C113 if a recipe's values are others than its start decides."""
    for key, value in decided.items():
        found, path = values.get(key), f"{where}{key}"
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            check_decided(found, value, f"{path}.")
        elif found != value:
            message = f"{path}={found}, but what init names was trained with {value}."
            raise ConfigError("C113", message, f"leave {path} out.", path)


def read_projector(init: str) -> dict[str, Tensor]:
    """Tensors of the projector that `init=hf:NAME` names, with the newline of a LLaVA-NeXT, under our names.

    Raises: ModelError M571 if there are none.
    """
    from safetensors import safe_open

    directory = local_directory(init.removeprefix(HF))
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no mapping
                name = key.removeprefix("model.")  # as files of LlavaForConditionalGeneration's own names begin
                if name.startswith(("multi_modal_projector.", "image_newline")):
                    ours = new_name(name, HUB, back=True).removeprefix(PROJECTOR)
                    found[ours] = tensors.get_tensor(key)
    if not found:
        message = f"init={init} holds no projector in safetensors files."
        raise ModelError("M571", message, "save it with save_pretrained of a present transformers.")
    return found


def _compat(init: str, config: Any) -> str | None:
    """`vision.compat` of a selection; LLaVA's "default" drops the first token, be it a CLS token or a patch."""
    dropped = int(config.vision_feature_select_strategy == "default")
    if dropped < PREFIX[config.vision_config.model_type]:
        raise _other(init, "keeps the CLS token among the image's")
    return TINYLLAVA_SIGLIP if dropped > PREFIX[config.vision_config.model_type] else None


def _grid(init: str, pinpoint: tuple[int, int], side: int) -> list[int]:
    """Rows and columns of a height and a width in pixels."""
    if any(pixels % side for pixels in pinpoint):
        raise _other(init, f"tiles images as {list(pinpoint)} pixels, which is no grid of {side}")
    return [pixels // side for pixels in pinpoint]


def _other(init: str, what: str) -> ModelError:
    fix = "start from a LLaVA or LLaVA-NeXT of transformers, or tune the model as it is by vlmpeft.tune."
    return ModelError("M572", f"init={init} {what}, which our parts cannot be.", fix)
