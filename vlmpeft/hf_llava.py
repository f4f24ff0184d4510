"""A model of ours as a directory of transformers' LLaVA, or of its LLaVA-NeXT, and of the processor it has."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from vlmpeft import fs
from vlmpeft.build import Bundle
from vlmpeft.conversion import check_language, complete_tower, no_form, plain_tensors
from vlmpeft.encoder import Encoder
from vlmpeft.hf_chat import chat_template
from vlmpeft.images import ImageTransform
from vlmpeft.language import decoder_of, logits_of
from vlmpeft.layouts import Exchange
from vlmpeft.llava_layout import to_hub
from vlmpeft.projectors import MLPProjector
from vlmpeft.tuners.linear import AdaptedLinear

WHERE = "transformers' LlavaForConditionalGeneration"
NEXT = "transformers' LlavaNextForConditionalGeneration"
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
ROW_MULTIPLE = 64  # LLaVA's converter pads the vocabulary of 32000 + 2 to 32064
LINEARS = [nn.Linear, nn.GELU, nn.Linear]


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer with `<image>` and a pad token. rows: of the embeddings that hold all of it."""

    tokenizer: Any
    image_token_id: int
    rows: int


def export_hf(bundle: Bundle, target: Path) -> None:
    """Write weights in the hub's layout, config, processor and generation config; adapters are left out unless merged.

    A model whose tiles merge by spatial_unpad becomes a LLaVA-NeXT.
    Raises: ModelError M570 for an encoder, a projector, a language model or images that the format cannot express.
    """
    _check_images(bundle)
    check_projector(bundle)
    check_language(bundle, WHERE)
    tower = complete_tower(bundle, WHERE)
    words = vocabulary(bundle)
    config = llava_config(bundle, tower, words)
    _check_classes(bundle, config)
    tensors = to_hub(plain_tensors(bundle, tower), words.rows)
    with fs.new_directory(target) as directory:
        config.save_pretrained(directory)
        _generation(bundle, words).save_pretrained(directory)
        processor(bundle, tower, words).save_pretrained(directory)
        fs.write_tensors(directory / "model.safetensors", tensors)


def is_next(bundle: Bundle) -> bool:
    """Whether a model's form in transformers is LLaVA-NeXT."""
    return bundle.model.view_grid is not None


def _check_images(bundle: Bundle) -> None:
    """Raise ModelError M570 unless LLaVA, or LLaVA-NeXT, sees images and lays their tokens out as this model does."""
    transform = bundle.image_transform
    if is_next(bundle):
        if transform.mode != "anyres":
            what = f"data.tile_merge=spatial_unpad with image_mode={transform.mode}"
            raise no_form(what, NEXT, "use vlmpeft.load, or train with data.image_mode=anyres.")
    elif transform.mode not in ("pad", "square"):
        fix = "use vlmpeft.load, or train with data.image_mode=pad or data.tile_merge=spatial_unpad."
        raise no_form(f"image_mode={transform.mode} with data.tile_merge=flat", WHERE, fix)


def pinpoints(transform: ImageTransform) -> list[list[int]]:
    """The grids of "anyres" as transformers has them: heights and widths in pixels."""
    return [[rows * transform.size, columns * transform.size] for rows, columns in transform.tiles]


def check_projector(bundle: Bundle) -> None:
    """Raise ModelError M570 unless the projector is two linear layers with GELU between them."""
    projector = bundle.model.projector
    plain = [layer.base_layer if isinstance(layer, AdaptedLinear) else layer for layer in projector.children()]
    if not isinstance(projector, MLPProjector) or [type(layer) for layer in plain] != LINEARS:
        options = "".join(f" {key}={value}" for key, value in bundle.recipe.projector.options.items())
        what = f"the projector {bundle.recipe.projector.name}{options}"
        fix = "use the model through vlmpeft.load, or train with projector=mlp2x_gelu projector.rms=0."
        raise no_form(what, WHERE, fix)


def vocabulary(bundle: Bundle) -> Vocabulary:
    """The tokenizer with what transformers needs in it, and as many rows as LLaVA's converter makes."""
    from transformers import AddedToken

    tokenizer: Any = copy.deepcopy(bundle.tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    rows = int(cast(Any, bundle.model.language).get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        rows = -(-len(tokenizer) // ROW_MULTIPLE) * ROW_MULTIPLE
    return Vocabulary(tokenizer, int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)), rows)


def llava_config(bundle: Bundle, tower: Any, words: Vocabulary) -> Any:
    """LlavaConfig of a bundle, or its LlavaNextConfig."""
    from transformers import LlavaConfig, LlavaNextConfig

    encoder = cast(Any, bundle.model.vision)
    language = cast(Any, bundle.model.language)
    text = copy.deepcopy(language.config)
    text.vocab_size, text.pad_token_id = words.rows, words.tokenizer.pad_token_id
    text.architectures = [type(language).__name__]
    kind: Any = LlavaNextConfig if is_next(bundle) else LlavaConfig
    config = kind(
        vision_config=tower.config,
        text_config=text,
        image_token_index=words.image_token_id,
        image_seq_length=encoder.num_tokens,
        vision_feature_layer=encoder.layer,
        vision_feature_select_strategy=selection(encoder),
        tie_word_embeddings=bool(text.tie_word_embeddings),
        **({"image_grid_pinpoints": pinpoints(bundle.image_transform)} if is_next(bundle) else {}),
    )
    config.architectures = [kind.__name__.replace("Config", "ForConditionalGeneration")]
    config.dtype = language.get_input_embeddings().weight.dtype
    return config


def selection(encoder: Encoder) -> Literal["default", "full"]:
    """How LLaVA calls what an encoder leaves out: "default" is the first token (CLS, or a patch by `vision.compat`),
    "full" nothing. CLIP and SigLIP have no more than one to leave out.
    """
    return "default" if encoder.prefix_tokens + encoder.dropped_patches else "full"


@torch.no_grad()
def _check_classes(bundle: Bundle, config: Any) -> None:
    """Raise ModelError M570 if transformers would build another decoder, or leave out what ours does to its logits."""
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    kind: Any = LlavaNextForConditionalGeneration if is_next(bundle) else LlavaForConditionalGeneration
    language = cast(Any, bundle.model.language)
    with torch.device("meta"):
        theirs: Any = kind(config)
    head: nn.Linear = language.get_output_embeddings()
    hidden = torch.linspace(-1, 1, head.in_features).to(head.weight)
    same_logits = torch.equal(logits_of(language, hidden), head(hidden))
    if type(theirs.model.language_model) is not type(decoder_of(language)) or not same_logits:
        fix = "use the model through vlmpeft.load."
        raise no_form(f"the language model {type(language).__name__}", WHERE, fix)


def _generation(bundle: Bundle, words: Vocabulary) -> Any:
    """Greedy decoding that stops where our own does."""
    from transformers import GenerationConfig

    encoder = bundle.turn_encoder()
    ends = [s for s in encoder.template.segments([Exchange(("q",), "a")], None) if s.kind == "end"]
    stops = sorted({words.tokenizer.eos_token_id, *(encoder.segment_ids(s)[-1] for s in ends)})
    return GenerationConfig(
        do_sample=False,
        bos_token_id=words.tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=words.tokenizer.pad_token_id,
    )


def processor(bundle: Bundle, tower: Any, words: Vocabulary) -> Any:
    """The processor that sees what our `ImageTransform` sees, and lays questions out as our template does."""
    from transformers import LlavaImageProcessor, LlavaNextImageProcessor, LlavaNextProcessor, LlavaProcessor

    transform, encoder = bundle.image_transform, cast(Encoder, bundle.model.vision)
    common: dict[str, Any] = {
        "size": {"shortest_edge": transform.size},
        "crop_size": {"height": transform.size, "width": transform.size},
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
    images: Any
    if is_next(bundle):
        images = LlavaNextImageProcessor(image_grid_pinpoints=pinpoints(transform), **common)
    else:
        images = LlavaImageProcessor(do_pad=transform.mode == "pad", **common)
    kind: Any = LlavaNextProcessor if is_next(bundle) else LlavaProcessor
    return kind(
        image_processor=images,
        tokenizer=words.tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=selection(encoder),
        num_additional_image_tokens=encoder.prefix_tokens,
        chat_template=chat_template(bundle.turn_encoder()) or words.tokenizer.chat_template,
    )
