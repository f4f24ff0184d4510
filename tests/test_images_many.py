"""Several images a record, from the file to the answer: each in its place, in its order, in its own sample."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COLOURS, write_images
from runs import metrics, run_train
from torch import Tensor

import vlmpeft
from vlmpeft.batch import collate
from vlmpeft.build import Bundle
from vlmpeft.config import load_recipe
from vlmpeft.decode import Request, exchange_of
from vlmpeft.errors import DataError
from vlmpeft.images import open_image


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path) -> Bundle:
    made = vlmpeft.build(load_recipe(str(tiny_recipe), ["vision.image_size=64"]))
    torch.manual_seed(3)
    for parameter in made.model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)  # large enough that images matter
    made.model.eval()
    return made


@pytest.fixture(scope="module")
def pictures(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "images").glob("*.png"))[: len(COLOURS)]  # one of each colour


@torch.no_grad()
def logits(bundle: Bundle, *rows: list[Path], side: str = "right") -> list[Tensor]:
    """Of each row's question about its images, without the padding."""
    encoder = bundle.turn_encoder()
    encodings = [encoder.encode([exchange_of(Request(tuple(row), "What is shown?"))]) for row in rows]
    views = [view for row in rows for path in row for view in bundle.image_transform(open_image(path))]
    batch = collate(encodings, views, side=side)
    out = bundle.model(batch.input_ids, batch.attention_mask, pixel_values=batch.pixel_values).logits
    return [row[mask] for row, mask in zip(out, batch.attention_mask, strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sample_sees_its_own_images_and_no_neighbours(side: str, bundle: Bundle, pictures: list[Path]) -> None:
    """0 to 3 images beside 0 to 3 others: each row is what it is alone, whatever the other shows."""
    alone = {count: logits(bundle, pictures[:count])[0] for count in range(4)}
    for mine, theirs in product(range(4), range(4)):
        others = pictures[4 - theirs :]
        first, second = logits(bundle, pictures[:mine], others, side=side)
        torch.testing.assert_close(first, alone[mine], atol=1e-3, rtol=1e-3)
        if theirs:
            swapped, changed = logits(bundle, pictures[:mine], [pictures[0], *others[1:]], side=side)
            torch.testing.assert_close(swapped, first, atol=1e-3, rtol=1e-3)
            assert (changed - second).abs().max() > 0.05


def test_images_are_shown_in_the_order_given(bundle: Bundle, pictures: list[Path]) -> None:
    a, b, c = pictures[:3]
    orders = [logits(bundle, row)[0][-1] for row in ([a, b, c], [b, a, c], [a, c, b], [c, b, a])]
    for i, first in enumerate(orders):
        assert all((first - second).abs().max() > 0.05 for second in orders[i + 1 :])


def test_answers_about_two_images_depend_on_their_order(bundle: Bundle, pictures: list[Path]) -> None:
    red, blue = pictures[0], pictures[2]
    asked = [Request((red, blue), "What?"), Request((blue, red), "What?"), Request((red, blue), "<image>What?<image>")]
    options: dict[str, Any] = {"max_new_tokens": 4, "contrast": ("Yes", "No")}
    together = bundle.answer(asked, batch_size=3, **options)
    alone = [bundle.answer([request], **options)[0] for request in asked]
    assert [a.text for a in together] == [a.text for a in alone]
    margins = [a.margin for a in together]
    assert margins == pytest.approx([a.margin for a in alone], abs=1e-3)
    assert min(abs(x - y) for i, x in enumerate(margins) for y in margins[i + 1 :] if x and y) > 0.01


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with 0 to 3 images: which colours are shown, in order."""
    root = tmp_path_factory.mktemp("several")
    shown = write_images(root / "images", 8)
    records = []
    for i in range(8):
        chosen = [shown[(i + k) % 8] for k in range(i % 4)]
        question = "".join(f"Image {k + 1}: <image>\n" for k in range(len(chosen))) + "What is shown?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": " ".join(c for _, c in chosen) or "No"}]
        records.append({"id": i, "image": [name for name, _ in chosen], "conversations": turns})
    (root / "train.json").write_text(json.dumps(records))
    return root


def test_a_run_trains_on_records_with_0_to_3_images(several: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    more = ["stages.pretrain=null", f"data.instruct={several / 'train.json'}", f"data.images={several / 'images'}"]
    more += ["stages.instruct.optim.steps=4", "run.save_every=0", "stages.instruct.turns=chat"]
    assert run_train(tiny_recipe, tmp_path, *more) == 0
    losses = [float.fromhex(row["loss"]) for row in metrics(tmp_path)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_too_few_images_for_the_marks_are_refused(bundle: Bundle, pictures: list[Path]) -> None:
    with pytest.raises(DataError, match="D107"):
        bundle.generate(pictures[:2], "<image><image><image>What?")
