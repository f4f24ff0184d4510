"""A table of language-model families by behaviours: what works for one family works for all of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, LAYERS, write_family
from PIL import Image
from tiny_models import TOKENS, WIDTH, Patches

import vlmpeft
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.config import load_recipe
from vlmpeft.decode import Answer, Request, answer
from vlmpeft.errors import ModelError
from vlmpeft.images import ImageTransform
from vlmpeft.language import decoder_of, load_language, width_of
from vlmpeft.projectors import PROJECTORS
from vlmpeft.template import TurnEncoder
from vlmpeft.tune import tune
from vlmpeft.tuners import LoRA
from vlmpeft.vlm import VLM

WITH_LINEARS = [kind for kind in FAMILIES if LAYERS[kind]]
TRANSFORM = ImageTransform(4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "square")


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture
def vlm(directory: Path) -> tuple[VLM, Any]:
    return assembled(directory)


def assembled(directory: Path) -> tuple[VLM, Any]:
    language, tokenizer = load_language(str(directory))
    torch.manual_seed(0)
    projector: Any = PROJECTORS.build("mlp2x_gelu", WIDTH, width_of(language))
    return VLM(Patches(), projector, language).eval(), tokenizer


@cache
def pictures() -> tuple[Image.Image, ...]:
    return tuple(Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green"))


@torch.no_grad()
def test_text_gives_the_logits_of_the_model_itself(vlm: tuple[VLM, Any], directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.arange(5, 29).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    expected = own(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert expected.std() > 0.1
    torch.testing.assert_close(vlm[0](ids, mask).logits[mask.bool()], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_image_stands_where_its_tokens_are(vlm: tuple[VLM, Any]) -> None:
    model = vlm[0]
    pixels = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    words = torch.tensor([[7, 8, 30, 31, 32]])
    ids = torch.cat([words[:, :2], torch.full((1, TOKENS), IMAGE_TOKEN_ID), words[:, 2:]], 1)
    embedded = model.language.get_input_embeddings()(words)
    spliced = torch.cat([embedded[:, :2], model.projector(model.vision(pixels)), embedded[:, 2:]], 1)
    expected = model.language(inputs_embeds=spliced).logits
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits, expected, rtol=0, atol=1e-5)
    other = model(ids, pixel_values=-pixels).logits
    assert not torch.allclose(other[:, 2 + TOKENS :], expected[:, 2 + TOKENS :])


@torch.no_grad()
def test_answers_in_left_padded_batches_are_those_one_by_one(vlm: tuple[VLM, Any]) -> None:
    model, tokenizer = vlm
    encoder = TurnEncoder(tokenizer, "chatml", TOKENS)
    red, blue, green = pictures()
    asked = [
        Request((red,), "Is there a red image?"), Request((), "What?"), Request((blue, green), "Which of the two?"),
        Request((green,), "Is there a blue photo of a square? Yes No"), Request((red,), "What is shown?"),
    ]  # fmt: skip

    def answers(batch_size: int) -> list[Answer]:
        options: Any = {"max_new_tokens": 5, "contrast": ("Yes", "No")}
        return answer(model, encoder, TRANSFORM, asked, batch_size=batch_size, **options)

    alone, together = answers(1), answers(len(asked))
    assert len({one.margin for one in alone}) == len(asked)
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.margin for one in together] == pytest.approx([one.margin for one in alone], abs=1e-4)


@pytest.mark.parametrize("family", WITH_LINEARS)
def test_lora_on_all_linear_wraps_every_linear_layer_of_the_blocks_alone(family: str, tmp_path: Path) -> None:
    model = assembled(write_family(family, tmp_path))[0]
    tuned = tune(model, [LoRA(r=2)])
    layers = {name.rsplit(".lora_", 1)[0] for name in tuned.trainable()}
    assert {path.rsplit(".", 1)[-1] for path in layers} == set(LAYERS[family])
    assert len(layers) == 2 * len(LAYERS[family])
    blocks = next(m for m in decoder_of(model.language).children() if isinstance(m, torch.nn.ModuleList))
    inside = {id(m) for m in blocks.modules()}
    assert all(id(model.get_submodule(path)) in inside for path in layers)


@pytest.mark.parametrize("family", WITH_LINEARS)
def test_a_preset_that_a_family_lacks_names_what_it_has(family: str, tmp_path: Path) -> None:
    model = assembled(write_family(family, tmp_path))[0]
    for preset, wanted in (("minimal", ("q_proj", "v_proj")), ("standard", ("q_proj", "k_proj", "v_proj", "o_proj"))):
        missing = [name for name in wanted if name not in LAYERS[family]]
        if missing:
            known = ", ".join(LAYERS[family])
            with pytest.raises(ModelError, match=f"M550.*'{missing[0]}' in language.*known: {known}.*all-linear"):
                tune(model, [LoRA(r=2, targets=preset)])
        else:
            trained = tune(model, [LoRA(r=2, targets=preset)])
            assert {name.rsplit(".", 3)[-3] for name in trained.trainable()} == set(wanted)
            trained.remove()


def test_a_family_without_linear_layers_says_so(tmp_path: Path) -> None:
    model = assembled(write_family("gpt2", tmp_path))[0]
    with pytest.raises(ModelError, match=r"M550.*no linear layer in language"):
        tune(model, [LoRA(r=2)])


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@torch.no_grad()
def test_scaled_image_embeddings_are_what_gemma_saw_in_transformers_4(family: str, tmp_path: Path) -> None:
    """GemmaModel of transformers 4 multiplied all of inputs_embeds, words and images, by sqrt(hidden_size)."""
    plain = assembled(write_family(family, tmp_path))[0]
    model = VLM(plain.vision, plain.projector, plain.language, image_scale=32**0.5)
    pixels = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    words = torch.tensor([[7, 8, 30, 31, 32]])
    ids = torch.cat([words[:, :2], torch.full((1, TOKENS), IMAGE_TOKEN_ID), words[:, 2:]], 1)
    raw = F.embedding(words, plain.language.get_input_embeddings().weight)
    spliced = torch.cat([raw[:, :2], plain.projector(plain.vision(pixels)), raw[:, 2:]], 1)
    expected = plain.language(inputs_embeds=spliced * 32**0.5).logits
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain(ids, pixel_values=pixels).logits, expected, atol=1e-2)


def test_the_recipe_sets_the_scale_of_image_embeddings(tiny_recipe: Path) -> None:
    for value, scale in (("false", 1.0), ("true", 32**0.5)):
        recipe = load_recipe(str(tiny_recipe), [f"language.scale_image_embeddings={value}"])
        assert vlmpeft.build(recipe).model.image_scale == pytest.approx(scale)
