"""A model of ours as a checkpoint of the LLaVA or MobileVLM repository, with safetensors in place of pickles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from vlmpeft import fs
from vlmpeft.build import Bundle
from vlmpeft.conversion import check_language, complete_tower, no_form, plain_tensors
from vlmpeft.llava_layout import ORIGINAL, renamed

WHERE = "LLaVA's original layout"
LLAVA = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
MOBILE = {"llama": ("mobilevlm", "MobileLlamaForCausalLM")}
MOBILE_PROJECTORS = {"ldp": "ldpnet", "ldpv2": "ldpnetv2"}


def export_llava(bundle: Bundle, target: Path) -> None:
    """Write weights, config.json and tokenizer; adapters are left out unless merged.

    Raises: ModelError M570 for an encoder, a projector or a language model that those repositories do not have.
    """
    check_language(bundle, WHERE)
    projector, classes = _projector(bundle)
    text: dict[str, Any] = cast(Any, bundle.model.language).config.to_dict()
    if text["model_type"] not in classes:
        raise no_form(f"the language model {text['model_type']}", WHERE, "export with to=hf.")
    tower = complete_tower(bundle, WHERE)
    tensors = renamed(plain_tensors(bundle, tower), ORIGINAL)
    model_type, architecture = classes[text["model_type"]]
    if classes is MOBILE and bundle.image_transform.mode == "anyres":
        raise no_form("image_mode=anyres", "MobileVLM's layout", "train with data.image_mode=pad.")
    config = text | _multimodal(bundle, projector) | {"model_type": model_type, "architectures": [architecture]}
    with fs.new_directory(target) as directory:
        fs.write_json(directory / "config.json", config)
        bundle.tokenizer.save_pretrained(directory)
        fs.write_tensors(directory / "model.safetensors", tensors)


def _projector(bundle: Bundle) -> tuple[str, dict[str, tuple[str, str]]]:
    """The projector's name there, and the classes of the repository that has it by the language model's type."""
    name = bundle.recipe.projector.name
    options = {k: v for k, v in bundle.recipe.projector.options.items() if k != "dropout"}  # acts in training alone
    if name in MOBILE_PROJECTORS and not options:
        return MOBILE_PROJECTORS[name], MOBILE
    if re.fullmatch(r"linear|mlp\d+x_gelu", name) and not options:
        return name, LLAVA
    settings = "".join(f" {key}={value}" for key, value in options.items())
    raise no_form(f"the projector {name}{settings}", WHERE, "use the model through vlmpeft.load.")


def _multimodal(bundle: Bundle, projector: str) -> dict[str, Any]:
    """The fields that LLaVA adds to a language model's config.json.

    Raises: ModelError M570 for a newline behind a single view, which that code leaves out.
    """
    encoder, transform = cast(Any, bundle.model.vision), bundle.image_transform
    anyres = transform.mode == "anyres"
    if transform.merge != "flat" and not anyres:
        what = f"data.tile_merge=spatial_unpad with image_mode={transform.mode}"
        raise no_form(what, WHERE, "train with data.image_mode=anyres.")
    side = transform.size
    tiles = {"image_grid_pinpoints": [[columns * side, rows * side] for rows, columns in transform.tiles]}
    return {
        **(tiles if anyres else {}),
        "mm_vision_tower": bundle.recipe.vision.name.removeprefix("hf:"),
        "mm_vision_select_layer": encoder.layer,
        "mm_vision_select_feature": "patch" if encoder.prefix_tokens else "cls_patch",
        "mm_hidden_size": encoder.width,
        "mm_projector_type": projector,
        "mm_patch_merge_type": transform.merge,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "vision_tower_type": "clip",
        "image_aspect_ratio": transform.mode,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": bundle.recipe.data.max_length,
    }
