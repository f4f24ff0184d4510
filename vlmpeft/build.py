"""Recipe -> Bundle: load the frozen parts, assemble them, quantise, tune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from vlmpeft.connector import fresh_projector, view_grid
from vlmpeft.cpu_attention import attend_in_fp32, is_faster
from vlmpeft.data_config import DataConfig
from vlmpeft.decode import Answer, OnBatch, Request
from vlmpeft.encoder import Triple
from vlmpeft.errors import EnvironmentFault
from vlmpeft.images import ImageReader, ImageTransform
from vlmpeft.language import empty_language, fingerprint, load_language, load_tokenizer, width_of
from vlmpeft.likelihood import Likelihood, likelihoods
from vlmpeft.loglik import answer_each
from vlmpeft.parts import Parts
from vlmpeft.quant import quantise
from vlmpeft.quant_memory import WeightBytes, planned_bytes
from vlmpeft.recipe import Recipe, Stage
from vlmpeft.start import start_from
from vlmpeft.template import TurnEncoder
from vlmpeft.tokens import add_tokens
from vlmpeft.tune import Tuned
from vlmpeft.tuners.base import ReadsOriginals
from vlmpeft.tuners.tokens import grow
from vlmpeft.vision import Encoder, empty_vision, load_vision
from vlmpeft.vlm import VLM


@dataclass
class Bundle:
    """A model with all that is needed to train and to ask it.

    Args:
        fingerprints: of the frozen base parts as they were loaded ("vision", "language").
        stage: the stage whose template and system prompt apply.
    """

    model: VLM
    tokenizer: Any
    image_transform: ImageTransform
    tuned: Tuned
    recipe: Recipe
    stage: Stage
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> Parts:
        """The anatomy of the model."""
        return self.tuned.parts

    @property
    def image_tokens(self) -> int:
        """Tokens one view of an image takes in the language model; see `TurnEncoder.tokens_of` for a whole image."""
        return image_tokens(self.model)

    def turn_encoder(self, stage: Stage | None = None) -> TurnEncoder:
        """Encodes conversations as a stage does, the current one if None."""
        stage = stage or self.stage
        new = self.recipe.tokens.add
        view_grid = self.model.view_grid
        return TurnEncoder(self.tokenizer, stage.template, self.image_tokens, stage.system, new, view_grid)

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        contrast: tuple[str, str] | None = None,
        on_batch: OnBatch | None = None,
    ) -> list[Answer]:
        """See `loglik.answer_each`."""
        return answer_each(
            self.model, self.turn_encoder(), self.image_transform, requests,
            max_new_tokens=max_new_tokens, batch_size=batch_size, contrast=contrast, on_batch=on_batch,
        )  # fmt: skip

    def likelihoods(self, requests: Sequence[Request], *, batch_size: int = 8) -> list[tuple[Likelihood, ...]]:
        """See `likelihood.likelihoods`."""
        return likelihoods(self.model, self.turn_encoder(), self.image_transform, requests, batch_size=batch_size)

    def generate(self, images: Any, prompt: str, **options: Any) -> str:
        """Answer one prompt. Args: images: a path or PIL image, a list of them, or None. Options: as `answer`."""
        return self.answer([Request(_several(images), prompt)], **options)[0].text

    def generate_batch(self, requests: Sequence[tuple[Any, str]], **options: Any) -> list[str]:
        """Answer (images, prompt) pairs together; the texts are those of `generate` one by one."""
        made = [Request(_several(images), prompt) for images, prompt in requests]
        return [a.text for a in self.answer(made, **options)]

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        """A picture of the same size in the encoder's mean colour."""
        size = ImageReader(self.image_transform).picture(image).size
        return Image.new("RGB", size, self.image_transform.fill)


def _several(images: Any) -> tuple[Path | Image.Image, ...]:
    """None, one image or a list of them as a tuple."""
    listed = [] if images is None else images if isinstance(images, list | tuple) else [images]
    return tuple(Path(image) if isinstance(image, str) else image for image in listed)


def image_tokens(model: VLM) -> int:
    """Tokens one view of an image takes after the projector."""
    return int(cast(Any, model.projector).num_tokens(cast(Encoder, model.vision).num_tokens))


def choose_device(name: str) -> torch.device:
    """`auto` takes an accelerator if there is one. Raises: EnvironmentFault E412 for one that is not there."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        reason = "torch knows no such device" if said.startswith("Expected one of") else said
        fix = "use auto or cpu (run.device=auto or cpu in a recipe)."
        raise EnvironmentFault("E412", f"device '{name}' cannot be used: {reason}.", fix) from error
    return torch.device(name)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` takes bf16 where the hardware multiplies it, else fp32."""
    if precision == "auto":
        cuda = device.type == "cuda"
        units = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else _cpu_multiplies_bf16()
        return torch.bfloat16 if units else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def assemble(recipe: Recipe, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Bundle:
    """Load the base parts, put a fresh projector between them and quantise what is to be; nothing is trained yet.

    Args: seed: of the projector's initial weights.
    """
    vision = load_vision(**{f: getattr(recipe.vision, f) for f in recipe.vision.__dataclass_fields__})
    config = recipe.language
    language, tokenizer = load_language(config.name, dtype=dtype, attention=config.attention, eos=config.eos)
    if config.attention == "auto" and is_faster(dtype, device):
        attend_in_fp32(language)
    prints = {"vision": fingerprint(vision), "language": fingerprint(language)}
    add_tokens(language, tokenizer, recipe.tokens.add, recipe.tokens.init)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = fresh_projector(recipe, vision, width_of(language))
    image_scale = math.sqrt(width_of(language)) if config.scale_image_embeddings else 1.0
    model = VLM(vision.to(dtype), projector, language, image_scale, view_grid(recipe, vision, projector))
    tuners = [tuner for stage in recipe.stages.values() for tuner in stage.tuners.values()]
    originals = any(isinstance(t, ReadsOriginals) and t.needs_originals for t in tuners)
    quantise(model, recipe.quant, device=device, keep_originals=originals)
    model = model.to(device).requires_grad_(False)
    transform = _transform(recipe.data, vision.image_size, vision.mean, vision.std)
    stage = list(recipe.stages.values())[-1]
    return Bundle(model, tokenizer, transform, Tuned(model, model.parts), recipe, stage, prints)


def _transform(data: DataConfig, size: int, mean: Triple, std: Triple) -> ImageTransform:
    """What becomes of an image before the encoder sees it."""
    return ImageTransform(size, mean, std, data.image_mode, data.tiles, data.max_image_pixels, data.tile_merge)


def build(recipe: Recipe) -> Bundle:
    """A recipe's model, tuned as its last stage says: load, then quantise, then start from `init`, then tune.

    Raises: as `start_from`.
    """
    device = choose_device(recipe.run.device)
    bundle = assemble(recipe, device, choose_dtype(recipe.run.precision, device), recipe.run.seed)
    if recipe.init is not None:
        start_from(bundle.model, recipe, bundle.fingerprints, recipe.init)
    enter_stage(bundle, bundle.stage)
    return bundle


def enter_stage(bundle: Bundle, stage: Stage) -> None:
    """Make exactly what a stage trains trainable; earlier tuners stay in place, frozen, and go on being saved."""
    bundle.stage = stage
    with torch.random.fork_rng():  # new adapters start alike whatever was drawn before, resumed or not
        torch.manual_seed(bundle.recipe.run.seed)
        bundle.tuned.apply(stage.tuners)


def empty_bundle(recipe: Recipe) -> Bundle:
    """What encodes a recipe's data, around a model without weights: from config.json files and the tokenizer alone."""
    language = empty_language(recipe.language.name)
    tokenizer = load_tokenizer(recipe.language.name, recipe.language.eos)
    add_tokens(language, tokenizer, recipe.tokens.add)
    asked = recipe.vision
    vision = empty_vision(asked.name, layer=asked.layer, image_size=asked.image_size, compat=asked.compat)
    with torch.device("meta"):
        projector = fresh_projector(recipe, vision, width_of(language))
    model = VLM(vision, projector, language, view_grid=view_grid(recipe, vision, projector))
    transform = _transform(recipe.data, vision.image_size, asked.mean or vision.mean, asked.std or vision.std)
    return Bundle(model, tokenizer, transform, Tuned(model, model.parts), recipe, list(recipe.stages.values())[-1])


def dry_run(recipe: Recipe) -> dict[str, list[dict[str, object]]]:
    """Trainable table of every stage from config.json files alone: no weights, no data, on the meta device.

    Returns: rows of `Tuned.table` by stage.
    """
    model = empty_model(recipe)
    tuned = Tuned(model, model.parts)
    tables: dict[str, list[dict[str, object]]] = {}
    for name, stage in recipe.stages.items():
        tuned.apply(stage.tuners)
        tables[name] = tuned.table()
    return tables


def dry_weights(recipe: Recipe) -> WeightBytes:
    """What the weights of a recipe's model will take in memory, without adapters; from config.json files alone."""
    model, dtype = empty_model(recipe), choose_dtype(recipe.run.precision, choose_device(recipe.run.device))
    return planned_bytes(model, model.parts, recipe.quant, dtype)


def empty_model(recipe: Recipe) -> VLM:
    """A recipe's model on the meta device, with rows for its new tokens."""
    language = empty_language(recipe.language.name)
    if recipe.tokens.add:
        grow(language, language.get_input_embeddings().weight.shape[0], [()] * len(recipe.tokens.add))
    asked = recipe.vision
    vision = empty_vision(asked.name, layer=asked.layer, image_size=asked.image_size, compat=asked.compat)
    with torch.device("meta"):
        projector = fresh_projector(recipe, vision, width_of(language))
    return VLM(vision, projector, language, view_grid=view_grid(recipe, vision, projector))
