"""What merging and exporting share: the model they read, its plain tensors, the directory they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vlmpeft.build import Bundle
from vlmpeft.checkpoint import load
from vlmpeft.encoder import RANDOM, Encoder
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.language import decoder_of
from vlmpeft.parts import path_of
from vlmpeft.sources import hub_or_cache, resolve
from vlmpeft.vision_transformers import load_transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOWER = "vision.backbone."
TOWERS = ("clip_vision_model", "siglip_vision_model")


def open_model(directory: str, dtype: str) -> Bundle:
    """A model directory on the CPU, in the dtype that is to be written, never quantised: what it leaves is whole.

    Raises: ConfigError C102, and as `load`.
    """
    if dtype not in DTYPES:
        raise ConfigError("C102", f"dtype={dtype}: no such dtype.", "use " + ", ".join(DTYPES) + ".")
    return load(directory, device="cpu", dtype=DTYPES[dtype], quantised=False)


def free_directory(out: str) -> Path:
    """The directory to write. Raises: ConfigError C112 if something is there: it would be replaced."""
    path = Path(out).absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError("C112", f"out={out} is not empty.", "name a new directory.")
    return path


def no_form(what: str, where: str, fix: str) -> ModelError:
    """M570: something of a model that a format cannot express."""
    return ModelError("M570", f"{what} has no form in {where}.", fix)


def complete_tower(bundle: Bundle, where: str) -> Any:
    """The CLIP or SigLIP tower with the layers that our encoder leaves out, our own weights in it.

    Args: where: the format it is for, for messages.
    Raises: ModelError M570 for other encoders.
    """
    config, encoder = bundle.recipe.vision, cast(Encoder, bundle.model.vision)
    fix = "use the model through vlmpeft.load, or train with vision=hf:NAME_OR_DIR."
    source, _, name = config.name.partition(":")
    if source != "hf":
        raise no_form(f"the encoder {config.name}", where, fix)
    file = None if config.weights in (None, RANDOM) else Path(resolve(str(config.weights)))
    with hub_or_cache():
        loaded = load_transformers(
            name, pretrained=config.weights is None, file=file, by=config.weights_by, image_size=None
        )
    tower: Any = loaded.backbone
    if tower.config.model_type not in TOWERS:
        raise no_form(f"the encoder {config.name} ({tower.config.model_type})", where, fix)
    if encoder.image_size != tower.config.image_size:
        resized = f"vision.image_size={encoder.image_size} of an encoder for {tower.config.image_size}"
        raise no_form(resized, where, fix)
    ours = bundle.tuned.plain_state()
    mine = {k.removeprefix(TOWER): v for k, v in ours.items() if k.startswith(TOWER)}
    tower.load_state_dict({**tower.state_dict(), **mine})  # strict: what is ours must have its place there
    return tower.to(next(iter(mine.values())).dtype)


def plain_tensors(bundle: Bundle, tower: Any) -> dict[str, Tensor]:
    """Every tensor of a bundle under the names of `llava_layout`, without adapters, in one dtype, tied ones once."""
    language: Any = bundle.model.language
    tied = language.get_output_embeddings().weight is language.get_input_embeddings().weight
    dtype = language.get_input_embeddings().weight.dtype
    found = {f"vision.{k}": v for k, v in tower.state_dict().items()}
    found |= {k: v for k, v in bundle.tuned.plain_state().items() if not k.startswith("vision.")}
    if tied:
        del found[f"language.{path_of(language, language.get_output_embeddings())}.weight"]
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def check_language(bundle: Bundle, where: str) -> None:
    """Raise ModelError M570 unless the causal LM is a decoder called `model` under a head called `lm_head`."""
    language: Any = bundle.model.language
    head = language.get_output_embeddings()
    named = path_of(language, decoder_of(language)) == "model" and path_of(language, head) == "lm_head"
    if bundle.recipe.language.scale_image_embeddings:
        raise no_form("language.scale_image_embeddings", where, "use the model through vlmpeft.load.")
    if not named or getattr(head, "bias", None) is not None:
        raise no_form(f"the language model {type(language).__name__}", where, "export a Llama-like language model.")
