"""Any-resolution tiling: grids, tiles and counts as transformers' LLaVA-NeXT has them, and whole runs on them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import metrics, run_train, some_logits, vary
from transformers import LlavaNextImageProcessor, LlavaNextImageProcessorPil
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import vlmpeft
from vlmpeft.anyres import TILES, Tiling, best_grid, boxes, placement
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.build import Bundle
from vlmpeft.config import load_recipe
from vlmpeft.data import Sample, Samples, load_batches, truncated
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.decode import Request
from vlmpeft.errors import DataError
from vlmpeft.eval import pope
from vlmpeft.features import cache_features
from vlmpeft.images import ImageReader, ImageTransform
from vlmpeft.prepare import prepare
from vlmpeft.record_encoder import Preparation
from vlmpeft.template import IMAGE, Exchange, TurnEncoder

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
SIDE = 64
SIZES = [(640, 480), (480, 640), (333, 500), (33, 71), (15, 9), (64, 64), (1, 1), (200, 1), (1, 200), (500, 101)]
SIZES += [(128, 64), (129, 64), (127, 128), (65, 64), (97, 61), (1000, 300), (300, 1000), (128, 128), (61, 190)]
GRIDS = {"LLaVA-NeXT": TILES, "lying": ((1, 2), (1, 3)), "many": tuple((r, c) for r in range(1, 5) for c in (3, 1, 2))}
PICTURES = {"small.png": (60, 40), "wide.png": (200, 60), "tall.png": (50, 190), "big.png": (150, 140)}
VIEWS = {"small.png": 3, "wide.png": 4, "tall.png": 4, "big.png": 5}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor(kind: Any, side: int) -> Any:
    pinpoints = [[rows * side, columns * side] for rows, columns in TILES]
    crop = {"height": side, "width": side}
    return kind(size={"shortest_edge": side}, crop_size=crop, image_grid_pinpoints=pinpoints)


@pytest.mark.parametrize("tiles", GRIDS.values(), ids=GRIDS)
def test_the_grid_and_the_place_on_it_are_those_of_transformers(tiles: tuple[tuple[int, int], ...]) -> None:
    rng = random.Random(0)
    sizes = SIZES + [(rng.randint(8, 900), rng.randint(8, 900)) for _ in range(300)]
    pinpoints = [(rows * SIDE, columns * SIDE) for rows, columns in tiles]
    for width, height in sizes:
        rows, columns = best_grid((width, height), SIDE, tiles)
        assert (rows * SIDE, columns * SIDE) == select_best_resolution((height, width), pinpoints)
        image = torch.empty(3, height, width, device="meta")
        theirs = get_patch_output_size(image, (rows * SIDE, columns * SIDE), ChannelDimension.FIRST)
        size, (left, top) = placement((width, height), (rows, columns), SIDE)
        assert (size[1], size[0]) == theirs
        assert (left, top) == ((columns * SIDE - size[0]) // 2, (rows * SIDE - size[1]) // 2)


def test_an_image_too_thin_for_any_grid_still_has_one() -> None:
    assert select_best_resolution((10, 2000), [(32, 16), (16, 32)]) == (32, 16)  # neither keeps a pixel
    assert best_grid((2000, 10), 16, ((2, 1), (1, 2))) == (2, 1)
    assert placement((2000, 10), (1, 2), 16)[0] == (32, 1)


def test_tiles_lie_row_by_row() -> None:
    assert list(boxes((2, 3), 10)) == [
        *[(0, 0, 10, 10), (10, 0, 20, 10), (20, 0, 30, 10)],
        *[(0, 10, 10, 20), (10, 10, 20, 20), (20, 10, 30, 20)],
    ]


@pytest.mark.parametrize("side", [SIDE, 37])
def test_views_are_bit_for_bit_those_of_the_llava_next_processor(side: int) -> None:
    transform = ImageTransform(side, MEAN, STD, "anyres")
    on_pil, on_torch = processor(LlavaNextImageProcessorPil, side), processor(LlavaNextImageProcessor, side)
    for width, height in SIZES:
        image = noise(width, height, seed=width)
        views = transform(image)
        assert len(views) == transform.num_views((width, height))
        pinpoints = [[rows * side, columns * side] for rows, columns in TILES]
        assert len(views) == image_size_to_num_patches((height, width), pinpoints, side)
        expected = on_pil(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(views, expected, atol=1e-6, rtol=0)
        other = on_torch(image, return_tensors="pt")["pixel_values"][
            0
        ]  # resizes by torchvision, which rounds otherwise
        assert views.shape == other.shape
        assert (views - other).abs().mean() < 0.005


def test_other_modes_give_one_view() -> None:
    for mode in ("pad", "square"):
        transform = ImageTransform(SIDE, MEAN, STD, mode)  # type: ignore[arg-type]
        assert transform.num_views((500, 101)) == 1
        assert transform(noise(50, 20)).shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize("tiles", GRIDS.values(), ids=GRIDS)
def test_views_are_counted_before_the_image_is_decoded(tiles: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """A photo on its side counts as it is shown; of grids in both orientations the header tells all."""
    exif = Image.Exif()
    exif[0x112] = 6
    for size in SIZES[2:9]:
        for suffix in ("jpg", "png", "tif"):
            transform = ImageTransform(SIDE, MEAN, STD, "anyres", tiles)
            path = tmp_path / f"a{size[0]}.{suffix}"
            noise(*size).save(path, exif=exif)
            assert ImageReader(transform).num_views(path) == len(ImageReader(transform)(path)), path


def test_counting_reads_headers_only_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(200, 60).save(tmp_path / "a.png")
    read = ImageReader(ImageTransform(SIDE, MEAN, STD, "anyres"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert read.num_views(tmp_path / "a.png") == 4
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    assert read.num_views(tmp_path / "a.png") == 4


def test_a_file_of_another_shape_than_counted_is_refused(tmp_path: Path) -> None:
    read = ImageReader(ImageTransform(SIDE, MEAN, STD, "anyres"))
    path = tmp_path / "a.png"
    noise(200, 60).save(path)
    assert read.num_views(path) == len(read(path)) == 4
    noise(150, 150).save(path)
    with pytest.raises(DataError, match=r"D104.*4 views, now 5"):
        read(path)


@pytest.mark.parametrize("independent", [False, True])
def test_an_image_takes_the_tokens_of_its_views(independent: bool, tokenizer: Any) -> None:
    encoder = TurnEncoder(tokenizer, "chatml", 4)
    exchanges = [Exchange((IMAGE, "and", IMAGE, "?"), "Yes"), Exchange(("What?",), "No")]
    one = encoder.encode(exchanges, independent)
    many = encoder.encode(exchanges, independent, tilings=[Tiling(3), Tiling(5)])
    runs = "".join("i" if i == IMAGE_TOKEN_ID else "t" for i in many.input_ids).split("t")
    assert [len(run) for run in runs if run] == [12, 20]
    text = [(i, x, t) for i, x, t in zip(many.input_ids, many.labels, many.turns, strict=True) if i != IMAGE_TOKEN_ID]
    same = [(i, x, t) for i, x, t in zip(one.input_ids, one.labels, one.turns, strict=True) if i != IMAGE_TOKEN_ID]
    assert text == same
    assert one == encoder.encode(exchanges, independent, tilings=[Tiling(), Tiling()])


def test_no_length_cuts_an_image_whatever_its_size(tokenizer: Any) -> None:
    encoder = TurnEncoder(tokenizer, "chatml", 2)
    turns = [Exchange((IMAGE, "\nask"), "A photo of a square."), Exchange((IMAGE, "\nask"), "Yes")]
    encoding = encoder.encode([*turns, Exchange((IMAGE, "\nask"), "No")], tilings=[Tiling(3), Tiling(5), Tiling()])
    files, tokens = [Path("a"), Path("b"), Path("c")], [6, 10, 2]
    first = next(i for i, label in enumerate(encoding.labels) if label != IGNORE) + 1
    for length in range(first, len(encoding.input_ids) + 1):
        cut, images = truncated(encoding, files, length, tokens, "right")
        assert images == tuple(files[: len(images)])
        assert cut.input_ids.count(IMAGE_TOKEN_ID) == sum(tokens[: len(images)])
        rest = length - len(cut.input_ids)  # given up before an image that does not fit, and only there
        assert rest == 0 or (encoding.input_ids[len(cut.input_ids)] == IMAGE_TOKEN_ID and rest < tokens[len(images)])
    with pytest.raises(DataError, match=r"D109.*images take 18"):
        truncated(encoding, files, first - 1, tokens, "right")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of four shapes, a training file with 0 to 2 of them a record, and yes/no questions."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "images").mkdir()
    names = list(PICTURES)
    for seed, (name, size) in enumerate(PICTURES.items()):
        noise(*size, seed=seed).save(root / "images" / name)
    shown = [[name] for name in names] + [names[:2], names[3:1:-1], [], []]
    records = [
        {"id": i, "image": images, "conversations": [
            {"from": "human", "value": "<image>" * len(images) + "\nWhat?"}, {"from": "gpt", "value": "A photo"},
        ]} for i, images in enumerate(shown)
    ]  # fmt: skip
    (root / "train.json").write_text(json.dumps(records))
    questions = [
        {"question_id": i, "image": names[i % 4], "text": text, "label": "yes"}
        for i, text in enumerate(["Is it red?", "Is there a blue image?"] * 4)
    ]
    (root / "pope.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return root


def overrides(folder: Path) -> list[str]:
    files = [f"data.{key}={folder / 'train.json'}" for key in ("pretrain", "instruct")]
    return ["vision.image_size=64", "data.image_mode=anyres", f"data.images={folder / 'images'}", *files]


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path, folder: Path) -> Bundle:
    return vary(vlmpeft.build(load_recipe(str(tiny_recipe), overrides(folder))))


def test_a_record_has_room_for_every_view(bundle: Bundle, folder: Path) -> None:
    read = ImageReader(bundle.image_transform)
    config = DataConfig(images=str(folder / "images"), image_mode="anyres")

    def samples(config: DataConfig) -> Sequence[Sample]:
        how = Preparation(config, bundle.turn_encoder(), tiling=read.tiling)
        return prepare([DataFile(str(folder / "train.json"))], how).samples

    found = samples(config)
    batch = next(load_batches(Samples(found, read), [list(range(8))], 0)).batch
    expected = [sum(VIEWS[path.name] for path in sample.images) for sample in found]
    assert (batch.input_ids == IMAGE_TOKEN_ID).sum(1).tolist() == [v * bundle.image_tokens for v in expected]
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == sum(expected)
    short = samples(replace(config, max_length=30, truncate="skip"))
    assert {sample.images for sample in short} == {()}  # 12 tokens and more an image: only text fits


@torch.no_grad()
def test_the_whole_picture_comes_first_then_its_tiles(bundle: Bundle, folder: Path) -> None:
    views = ImageReader(bundle.image_transform)(folder / "images" / "tall.png")
    model, k = bundle.model, bundle.image_tokens
    ids = torch.tensor([[7, *[IMAGE_TOKEN_ID] * len(views) * k, 8]])
    _, embeddings = model.embed(ids, torch.ones_like(ids), None, views)
    embedded = embeddings[0, 1:-1]
    each = [model.projector(model.vision(view[None]))[0] for view in views]
    torch.testing.assert_close(embedded, torch.cat(each), atol=1e-5, rtol=1e-5)


def test_cached_features_are_those_of_the_views(bundle: Bundle, folder: Path) -> None:
    read = ImageReader(bundle.image_transform)
    paths = sorted((folder / "images").iterdir())
    vision: Any = bundle.model.vision
    features = cache_features(vision, read, paths, batch_size=3)
    for path in paths:
        assert features(path).shape == (VIEWS[path.name], bundle.image_tokens, vision.width)
        torch.testing.assert_close(features(path), vision(read(path)), atol=1e-5, rtol=1e-5)


def test_batched_answers_equal_those_one_by_one(bundle: Bundle, folder: Path) -> None:
    paths = [folder / "images" / name for name in PICTURES]
    asked = [Request((path,), text) for text in ("What?", "Is there a red image?") for path in paths]
    asked += [Request((paths[0], paths[3]), "Alike?"), Request((paths[3], paths[0]), "Alike?"), Request((), "Why?")]
    options: dict[str, Any] = {"max_new_tokens": 6, "contrast": ("Yes", "No")}
    alone = [bundle.answer([request], **options)[0] for request in asked]
    assert len({a.text for a in alone}) > 6
    for size in (2, 5, 16):
        together = bundle.answer(asked, batch_size=size, **options)
        assert [a.text for a in together] == [a.text for a in alone]
        margins = [[a.margin for a in answers] for answers in (together, alone)]
        assert margins[0] == pytest.approx(margins[1], abs=1e-3)
    pictures = [Request((Image.open(paths[1]),), "What?"), Request((Image.open(paths[3]),), "What?")]
    assert [a.text for a in bundle.answer(pictures, **options)] == [alone[1].text, alone[3].text]


def test_pope_runs_on_tiles(bundle: Bundle, folder: Path) -> None:
    questions = pope.read_questions(str(folder / "pope.jsonl"))
    rows, scores = pope.evaluate(bundle, questions, folder / "images", batch_size=3, max_new_tokens=2, progress=False)
    assert scores["n"] == len(rows) == 8
    alone = [pope.evaluate(bundle, [q], folder / "images", max_new_tokens=2, progress=False)[0][0] for q in questions]
    assert [r["text"] for r in rows] == [r["text"] for r in alone]
    assert [r["margin"] for r in rows] == pytest.approx([r["margin"] for r in alone], abs=1e-3)


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_trains_and_is_loaded_with_its_tiles(
    cached: bool, tiny_recipe: Path, folder: Path, tmp_path: Path
) -> None:
    more = [*overrides(folder), "data.tiles=[[2,2],[1,2],[2,1],[1,4]]", f"data.cache_features={str(cached).lower()}"]
    more += ["stages.pretrain=null", "stages.instruct.optim.steps=2", "run.save_every=0", "align.epochs=1"]
    assert run_train(tiny_recipe, tmp_path, *more) == 0
    assert len(metrics(tmp_path)) == 2
    loaded = vlmpeft.load(tmp_path / "final", device="cpu")
    assert loaded.image_transform == ImageTransform(
        64, loaded.image_transform.mean, loaded.image_transform.std, "anyres", ((2, 2), (1, 2), (2, 1), (1, 4))
    )
    assert loaded.image_transform.num_views((400, 100)) == 5
    assert some_logits(loaded).isfinite().all()
    assert isinstance(loaded.generate(folder / "images" / "wide.png", "What?", max_new_tokens=3), str)
