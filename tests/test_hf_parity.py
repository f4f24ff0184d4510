"""Our forward against transformers' LlavaForConditionalGeneration with the same weights (CLIP and SigLIP towers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_images
from native import PATCH, SIZE, TOKENS, make_tower
from PIL import Image
from torch import Tensor
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from vlmpeft.anyres import Tiling
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, Batch, collate
from vlmpeft.data import encode_sample
from vlmpeft.decode import Request, exchange_of
from vlmpeft.errors import DataError
from vlmpeft.projectors import MLPProjector
from vlmpeft.recipe import DataConfig
from vlmpeft.records import RecordParser
from vlmpeft.template import Encoding, TurnEncoder
from vlmpeft.vision import load_vision
from vlmpeft.vlm import VLM

IMAGE_ID, VOCABULARY = 60, 64
SELECTIONS = {"clip": (-2, "default"), "siglip": (-1, "full"), "siglip inner": (-2, "full")}
IMAGE = [IMAGE_TOKEN_ID] * TOKENS
ROWS = {  # ids of a conversation; the last four are the answer
    "one image": [1, 5, *IMAGE, 7, 8, 9, 10, 11, 12],
    "three images": [1, *IMAGE, 6, *IMAGE, *IMAGE, 9, 3, 4, 5, 6],
    "text": [1, 20, 21, 22, 23, 24, 25, 26],
}


@pytest.fixture(scope="module", params=SELECTIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, VLM]:
    """transformers' model with random weights, and the same weights copied across into ours."""
    layer, strategy = SELECTIONS[request.param]
    folder = make_tower(tmp_path_factory.mktemp("tower"), request.param.split()[0])
    tower: Any = AutoModel.from_pretrained(folder)
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower.config, text_config=text, image_token_index=IMAGE_ID, image_seq_length=TOKENS,
        vision_feature_layer=layer, vision_feature_select_strategy=strategy,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: Any = LlavaForConditionalGeneration(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.model.vision_tower.load_state_dict(tower.state_dict())
    projector = MLPProjector(16, 32)
    for index, linear in ((0, "linear_1"), (2, "linear_2")):
        projector[index].load_state_dict(getattr(theirs.model.multi_modal_projector, linear).state_dict())
    language: Any = LlamaForCausalLM(text)
    language.model.load_state_dict(theirs.model.language_model.state_dict())
    language.lm_head.load_state_dict(theirs.lm_head.state_dict())
    vision = load_vision(f"hf:{folder}", layer=layer)
    return theirs, VLM(vision, projector, language).requires_grad_(False).eval()


def batch_of(names: list[str], side: str) -> Batch:
    samples = []
    for name in names:
        ids = ROWS[name]
        samples.append(Encoding(list(ids), [IGNORE] * (len(ids) - 4) + ids[-4:], [0] * len(ids)))
    count = sum(ROWS[name].count(IMAGE_TOKEN_ID) for name in names) // TOKENS
    pixels = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return collate(samples, list(pixels), side=side)


def their_inputs(batch: Batch) -> dict[str, Tensor | None]:
    mask = batch.attention_mask.long()
    return {
        "input_ids": batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN_ID, IMAGE_ID),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "pixel_values": batch.pixel_values,
        "labels": batch.labels,
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "names", [["one image"], ["three images"], ["text", "three images", "one image"]], ids=" + ".join
)
@torch.no_grad()
def test_logits_and_loss_equal_those_of_transformers(pair: tuple[Any, VLM], names: list[str], side: str) -> None:
    theirs, ours = pair
    batch = batch_of(names, side)
    expected = theirs(**their_inputs(batch))
    found = ours(batch.input_ids, batch.attention_mask, pixel_values=batch.pixel_values)
    assert (found.logits - expected.logits)[batch.attention_mask].abs().max() <= 1e-5
    assert expected.logits[batch.attention_mask].std() > 0.1
    torch.testing.assert_close(ours(**batch.tensors()).loss, expected.loss, rtol=0, atol=1e-5)


def test_gradients_of_the_projector_equal_those_of_transformers(pair: tuple[Any, VLM]) -> None:
    theirs, ours = pair
    batch = batch_of(["one image", "text", "three images"], "right")
    their_projector = theirs.model.multi_modal_projector
    ours.projector.requires_grad_(True)
    theirs.requires_grad_(False)
    their_projector.requires_grad_(True)
    try:
        ours(**batch.tensors()).loss.backward()
        theirs(**their_inputs(batch)).loss.backward()
        for mine, other in zip(ours.projector.parameters(), their_projector.parameters(), strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    finally:
        ours.zero_grad()
        theirs.zero_grad()
        ours.projector.requires_grad_(False)


@torch.no_grad()
def test_transformers_mixes_images_where_only_the_total_fits(pair: tuple[Any, VLM]) -> None:
    """Why counts are checked a sample: 24 + 8 placeholders take the 2 x 16 tokens of two images without a word."""
    theirs, _ = pair
    rows = torch.tensor([[1, *[IMAGE_ID] * 24, 5], [1, *[IMAGE_ID] * 8, *[5] * 17]])
    theirs(input_ids=rows, pixel_values=torch.zeros(2, 3, SIZE, SIZE))


def record(names: list[str], marks: list[int]) -> dict[str, Any]:
    turns = [
        {"from": who, "value": text}
        for count in marks
        for who, text in (("human", "<image>" * count + "What is shown?"), ("gpt", "A red square"))
    ]
    return {"id": "r", "image": names, "conversations": turns}


@pytest.mark.parametrize("template", ["chatml", "vicuna_v1", "plain", "tokenizer"])
def test_no_record_gives_a_sample_whose_placeholders_are_not_those_of_its_images(
    tmp_path: Path, tokenizer: Any, template: str
) -> None:
    """Whatever is cut, so a batch never fits in total alone: it has no other source than these samples."""
    names = [name for name, _ in write_images(tmp_path, 4)]
    parse, encoder = RecordParser(tmp_path / "data.json", tmp_path), TurnEncoder(tokenizer, template, TOKENS)
    made, codes = 0, set()
    for images in range(4):
        for marks in ([images], [1] * images, [images, 0], [0, images]):
            if not marks:
                continue
            conversation = parse(0, record(names[:images], marks))
            for length in range(16, 500, 7):
                try:
                    config = DataConfig(max_length=length)
                    sample = encode_sample(conversation, config, encoder, False, lambda _: Tiling())
                except DataError as error:
                    codes.add(error.code)
                    continue
                assert list(sample.input_ids).count(IMAGE_TOKEN_ID) == TOKENS * len(sample.images)
                assert len(sample.input_ids) <= length
                made += 1
    assert made > 100
    assert codes <= {"D109", "D110"}  # too long, or nothing to learn


@pytest.mark.parametrize(("images", "marks"), [(2, [1]), (1, [2]), (1, [1, 1]), (0, [1]), (3, [1, 1])])
def test_a_record_or_request_that_counts_wrongly_is_refused(tmp_path: Path, images: int, marks: list[int]) -> None:
    names = [name for name, _ in write_images(tmp_path, 4)]
    with pytest.raises(DataError, match=r"D107|D108"):
        RecordParser(tmp_path / "data.json", tmp_path)(0, record(names[:images], marks))
    picture = Image.new("RGB", (PATCH, PATCH))
    with pytest.raises(DataError, match="D107"):
        exchange_of(Request((picture,) * images, "<image>" * sum(marks) + "What?"))
