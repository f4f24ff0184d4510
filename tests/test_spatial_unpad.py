"""spatial_unpad: tokens, logits and gradients of transformers' LLaVA-NeXT with the same weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from llava import IMAGE_ID
from llava import config as llava_config
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextModel,
    LlavaNextProcessor,
)

from vlmpeft.anyres import TILES, Grid, Size, Tiling, merged_tokens, unpadded
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, Batch, collate
from vlmpeft.errors import ModelError
from vlmpeft.images import ImageTransform
from vlmpeft.projectors import PROJECTORS, MLPProjector
from vlmpeft.projectors.base import NEWLINE, add_newline, fit_grid, output_grid
from vlmpeft.steering import positions
from vlmpeft.template import Encoding
from vlmpeft.tile_merge import merged
from vlmpeft.vision import load_vision
from vlmpeft.vlm import VLM

SIDE, VIEW = 32, (4, 4)  # of tests/llava.py's tower: 16 tokens of a view
HALF = (0.5, 0.5, 0.5)
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows, columns in TILES]
SIZES = {  # width and height, and what unpad cuts of them
    "landscape, rows": (100, 40), "portrait, columns": (40, 100), "odd, rows": (97, 61), "odd, columns": (61, 97),
    "wide": (200, 41), "tall": (33, 190), "square": (64, 64), "small": (15, 9), "nearly a grid": (64, 63),
}  # fmt: skip
TRANSFORM = ImageTransform(SIDE, HALF, HALF, "anyres", merge="spatial_unpad")


def noise(size: Size, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def processor(side: int, patch: int) -> Any:
    """LLaVA-NeXT's processor around no tokenizer: it counts tokens."""
    crop = {"height": side, "width": side}
    pinpoints = [[rows * side, columns * side] for rows, columns in TILES]
    images = LlavaNextImageProcessor(size={"shortest_edge": side}, crop_size=crop, image_grid_pinpoints=pinpoints)
    made: Any = LlavaNextProcessor.__new__(LlavaNextProcessor)
    made.image_processor, made.patch_size, made.num_additional_image_tokens = images, patch, 0
    return made


@pytest.mark.parametrize(("side", "patch"), [(32, 8), (30, 10), (336, 14), (38, 8), (16, 16)])
def test_tokens_are_counted_as_the_processor_of_llava_next_counts_them(side: int, patch: int) -> None:
    theirs, rng = processor(side, patch), random.Random(0)
    transform = ImageTransform(side, HALF, HALF, "anyres", merge="spatial_unpad")
    cut = set()
    drawn = [(rng.randint(1, 900), rng.randint(1, 900)) for _ in range(400)]
    for size in [*SIZES.values(), *drawn, (200, 1), (1, 200)]:
        tiling, view = transform.tiling(size), (side // patch, side // patch)
        assert tiling.grid is not None
        expected = theirs._get_number_of_features(size[1], size[0], side, side)
        assert merged_tokens(tiling, view) == expected, size
        rows, columns = unpadded(tiling.grid, size, view)
        cut.add((rows.start > 0, columns.start > 0))
    assert side == patch or cut >= {(True, False), (False, True), (False, False)}


def pack(views: Tensor, size: Size, view: Grid, newline: Tensor) -> Tensor:
    """transformers' own merge of one image for a square view of any number of tokens."""
    shape = SimpleNamespace(image_size=SIDE * view[0], patch_size=SIDE)
    pinpoints = [[rows * SIDE * view[0], columns * SIDE * view[0]] for rows, columns in TILES]
    fake: Any = SimpleNamespace(config=SimpleNamespace(vision_config=shape, image_grid_pinpoints=pinpoints))
    sizes = torch.tensor([size[::-1]])
    packed_features, _ = LlavaNextModel.pack_image_features(fake, [views], sizes, "full", newline)
    found: Tensor = packed_features[0]
    return found


@pytest.mark.parametrize("side", [1, 3, 4, 12])
def test_the_merge_is_that_of_transformers_bit_for_bit(side: int) -> None:
    transform = ImageTransform(SIDE * side, HALF, HALF, "anyres", merge="spatial_unpad")
    tilings = [transform.tiling(size) for size in SIZES.values()]
    newline = torch.randn(6)
    images = [torch.randn(t.views, side * side, 6) for t in tilings]
    expected = [pack(x, size, (side, side), newline) for x, size in zip(images, SIZES.values(), strict=True)]
    assert [len(x) for x in expected] == [merged_tokens(t, (side, side)) for t in tilings]
    assert torch.equal(merged(torch.cat(images), tilings, (side, side), newline), torch.cat(expected))


def test_an_image_of_one_view_ends_in_one_newline_as_in_llava_next() -> None:
    views, newline = torch.randn(2, 16, 6), torch.randn(6)
    expected = torch.cat([pack(view[None], (50, 40), VIEW, newline) for view in views])
    assert torch.equal(merged(views, [Tiling(), Tiling()], VIEW, newline), expected)
    assert merged_tokens(Tiling(), VIEW) == 17


def test_tilings_of_other_views_are_refused() -> None:
    with pytest.raises(ModelError, match=r"M515.*tilings of 1 views, but pixel_values holds 2"):
        merged(torch.zeros(2, 16, 6), [Tiling()], VIEW, torch.zeros(6))
    with pytest.raises(ModelError, match="M515"):
        merged(torch.zeros(2, 16, 6), None, VIEW, torch.zeros(6))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, VLM]:
    """transformers' LLaVA-NeXT with random weights, and the same weights copied across into ours."""
    base = llava_config()
    config = LlavaNextConfig(
        vision_config=base.vision_config, text_config=base.text_config, image_token_index=IMAGE_ID,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: Any = LlavaNextForConditionalGeneration(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("tower")
    tower = CLIPVisionModel(config.vision_config)
    tower.load_state_dict(theirs.model.vision_tower.state_dict())
    tower.save_pretrained(folder)
    projector = MLPProjector(16, 32)
    add_newline(projector, 32)
    for index, linear in ((0, "linear_1"), (2, "linear_2")):
        projector[index].load_state_dict(getattr(theirs.model.multi_modal_projector, linear).state_dict())
    projector.get_parameter(NEWLINE).data.copy_(theirs.model.image_newline)
    language: Any = LlamaForCausalLM(config.text_config)
    language.model.load_state_dict(theirs.model.language_model.state_dict())
    language.lm_head.load_state_dict(theirs.lm_head.state_dict())
    vision = load_vision(f"hf:{folder}", layer=-2, mean=HALF, std=HALF)
    return theirs, VLM(vision, projector, language, view_grid=VIEW).requires_grad_(False).eval()


ROWS: dict[str, list[Size]] = {name: [size] for name, size in SIZES.items()}
ROWS |= {"text": [], "three": [SIZES["wide"], SIZES["portrait, columns"], SIZES["square"]]}
BATCHES = [[name] for name in SIZES] + [["three"], ["text", "three", "odd, rows"], ["tall", "text", "small"]]


def batch_of(names: Sequence[str], side: str) -> Batch:
    """A row each: its images between words, the second right behind the first; the last four tokens are the answer."""
    encodings, views = [], []
    for number, name in enumerate(names):
        tilings = [TRANSFORM.tiling(size) for size in ROWS[name]]
        ids = [1, 5 + number]
        for i, (size, tiling) in enumerate(zip(ROWS[name], tilings, strict=True)):
            ids += [IMAGE_TOKEN_ID] * merged_tokens(tiling, VIEW) + [9] * (i > 0)
            views += list(TRANSFORM(noise(size, seed=i)))
        ids += [20, 21, 7, 8, 9, 10]
        encodings.append(Encoding(ids, [IGNORE] * (len(ids) - 4) + ids[-4:], [0] * len(ids), tilings=tilings))
    return collate(encodings, views, side=side)


def their_inputs(batch: Batch, names: Sequence[str]) -> dict[str, Any]:
    sizes = [size for name in names for size in ROWS[name]]
    pixels = None
    if sizes:
        assert batch.pixel_values is not None
        images = batch.pixel_values.split([TRANSFORM.num_views(size) for size in sizes])
        most = max(map(len, images))
        pixels = torch.stack([torch.cat([x, torch.zeros(most - len(x), 3, SIDE, SIDE)]) for x in images])
    mask = batch.attention_mask.long()
    return {
        "input_ids": batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN_ID, IMAGE_ID),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([size[::-1] for size in sizes]) if sizes else None,
        "labels": batch.labels,
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("names", BATCHES, ids=" + ".join)
@torch.no_grad()
def test_logits_and_loss_equal_those_of_llava_next(pair: tuple[Any, VLM], names: list[str], side: str) -> None:
    theirs, ours = pair
    batch = batch_of(names, side)
    expected = theirs(**their_inputs(batch, names))
    found = ours(**{k: v for k, v in batch.inputs().items() if k not in ("labels", "supervised")})
    assert (found.logits - expected.logits)[batch.attention_mask].abs().max() <= 1e-5
    assert expected.logits[batch.attention_mask].std() > 0.1
    torch.testing.assert_close(ours(**batch.inputs()).loss, expected.loss, rtol=0, atol=1e-5)


def test_gradients_of_projector_and_newline_equal_those_of_llava_next(pair: tuple[Any, VLM]) -> None:
    theirs, ours = pair
    names = ["odd, rows", "text", "three"]
    batch = batch_of(names, "right")
    trained = {f"model.multi_modal_projector.linear_{i}": ours.projector[2 * i - 2] for i in (1, 2)}  # type: ignore[index]
    newline = theirs.model.image_newline
    ours.projector.requires_grad_(True)
    theirs.requires_grad_(False)
    for name in trained:
        theirs.get_submodule(name).requires_grad_(True)
    newline.requires_grad_(True)
    try:
        ours(**batch.inputs()).loss.backward()
        theirs(**their_inputs(batch, names)).loss.backward()
        torch.testing.assert_close(ours.projector.get_parameter(NEWLINE).grad, newline.grad, rtol=1e-4, atol=1e-6)
        assert newline.grad.abs().max() > 1e-4
        for name, linear in trained.items():
            expected = theirs.get_submodule(name).weight.grad
            torch.testing.assert_close(linear.weight.grad, expected, rtol=1e-4, atol=1e-6)
    finally:
        ours.zero_grad()
        theirs.zero_grad()
        ours.projector.requires_grad_(False)


def test_a_text_only_batch_reaches_the_newline_with_a_gradient_of_zero(pair: tuple[Any, VLM]) -> None:
    """So that processes whose rows have no image hold a gradient for every tensor the others have one for."""
    _, ours = pair
    ours.projector.requires_grad_(True)
    try:
        ours(**batch_of(["text"], "right").inputs()).loss.backward()
        grad = ours.projector.get_parameter(NEWLINE).grad
        assert grad is not None
        assert not grad.any()
    finally:
        ours.zero_grad()
        ours.projector.requires_grad_(False)


def test_an_image_without_its_tiling_is_refused(pair: tuple[Any, VLM]) -> None:
    with pytest.raises(ModelError, match=r"M515.*Batch.inputs"):
        pair[1](**batch_of(["square"], "right").tensors())


def test_the_merge_reads_nothing_back_from_the_device() -> None:
    """On the meta device, which has no values, whatever asks for one fails."""
    tilings = [TRANSFORM.tiling(size) for size in SIZES.values()]
    views = torch.empty(sum(t.views for t in tilings), 16, 6, device="meta", requires_grad=True)
    newline = torch.empty(6, device="meta", requires_grad=True)
    out = merged(views, tilings, VIEW, newline)
    out.sum().backward()
    sizes = [merged_tokens(t, VIEW) for t in tilings]
    assert len(out) == sum(sizes)
    visual = torch.ones(1, sum(sizes), dtype=torch.bool, device="meta")
    assert positions.chosen(positions.parse("ratio:0.1"), visual, sizes).shape == visual.shape


PROJECTED: list[tuple[str, dict[str, Any], Grid | None]] = [
    ("mlp2x_gelu", {}, (6, 6)), ("linear", {}, (6, 6)), ("pixel_shuffle", {"factor": 2}, (3, 3)),
    ("pixel_shuffle", {"factor": 4}, (2, 2)), ("ldp", {}, (3, 3)), ("ldpv2", {"grid": 2}, (2, 2)),
    ("resampler", {"queries": 9}, None), ("resampler", {"queries": 36}, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "grid"), PROJECTED)
def test_a_projector_says_on_which_grid_its_tokens_lie(name: str, options: dict[str, Any], grid: Grid | None) -> None:
    projector = PROJECTORS.build(name, 16, 32, **options)
    count = fit_grid(projector, (6, 6), 36)
    assert output_grid(projector, (6, 6), 36) == grid
    assert grid is None or grid[0] * grid[1] == count
    assert projector(torch.zeros(1, 36, 16)).shape[1] == count  # type: ignore[attr-defined]
    assert output_grid(PROJECTORS.build("linear", 16, 32), (6, 6), 35) is None  # a patch was dropped


def test_sides_of_an_uneven_grid_are_told_apart() -> None:
    for name, grid in (("pixel_shuffle", (2, 3)), ("ldp", (2, 3))):
        projector = PROJECTORS.build(name, 16, 32)
        fit_grid(projector, (4, 5), 20)
        assert output_grid(projector, (4, 5), 20) == grid


def test_the_newline_starts_as_in_llava_and_is_drawn_after_the_projector() -> None:
    def made(newline: bool) -> Any:
        torch.manual_seed(3)
        projector: Any = PROJECTORS.build("mlp2x_gelu", 16, 4096)
        if newline:
            add_newline(projector, 4096)
        return projector

    plain, other = made(False), made(True)
    assert torch.equal(plain[0].weight, other[0].weight)
    assert float(other.get_parameter(NEWLINE).detach().std()) == pytest.approx(1 / 64, rel=0.05)
    assert other.get_parameter(NEWLINE).shape == (4096,)
