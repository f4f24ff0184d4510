"""From conversations to batches: truncation, records with a system prompt, loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_records import record
from conftest import write_images
from test_prepare import prepared

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.data import Sample, Samples, load_batches, truncated
from vlmpeft.errors import DataError
from vlmpeft.template import IMAGE, Encoding, Exchange, TurnEncoder


@pytest.fixture
def encoder(tokenizer: Any) -> TurnEncoder:
    return TurnEncoder(tokenizer, "chatml", 4)


def two_images(encoder: TurnEncoder, k: int) -> tuple[Encoding, int]:
    """A conversation with an image in both questions, and the length at which k answer tokens of the first are left."""
    encoding = encoder.encode([Exchange((IMAGE, "\nask"), "A photo of a square."), Exchange((IMAGE, "\nask"), "Yes")])
    return encoding, next(i for i, x in enumerate(encoding.labels) if x != IGNORE) + k


@pytest.mark.parametrize("k", [1, 2, 3])
def test_truncation_keeps_exactly_the_answer_tokens_that_fit(k: int, encoder: TurnEncoder) -> None:
    encoding, length = two_images(encoder, k)
    cut, images = truncated(encoding, [Path("a"), Path("b")], length, [4, 4], "right")
    assert (len(cut.input_ids), cut.num_supervised, images) == (length, k, (Path("a"),))
    assert cut.input_ids == encoding.input_ids[:length]


def test_no_length_cuts_an_image_or_leaves_a_sample_without_answer(encoder: TurnEncoder) -> None:
    encoding, first = two_images(encoder, 1)
    for length in range(1, len(encoding.input_ids) + 2):
        if length < first:
            with pytest.raises(DataError, match=r"D109.*images take 8"):
                truncated(encoding, [Path("a"), Path("b")], length, [4, 4], "right")
            continue
        cut, images = truncated(encoding, [Path("a"), Path("b")], length, [4, 4], "right")
        assert len(cut.input_ids) <= length
        assert cut.input_ids.count(IMAGE_TOKEN_ID) == 4 * len(images)
        assert cut.num_supervised >= 1
        assert len(cut.input_ids) == len(cut.labels) == len(cut.turns)


def test_sample_of_exactly_the_limit_is_whole_and_other_policies_do_not_cut(encoder: TurnEncoder) -> None:
    encoding, _ = two_images(encoder, 1)
    size = len(encoding.input_ids)
    for policy in ("right", "skip", "error"):
        assert truncated(encoding, [Path("a")], size, [4], policy)[0] == encoding
    for policy in ("skip", "error"):
        with pytest.raises(DataError, match=f"needs {size} tokens, data.max_length is {size - 1}"):
            truncated(encoding, [Path("a")], size - 1, [4], policy)


@pytest.fixture
def samples(tmp_path: Path, encoder: TurnEncoder) -> list[Sample]:
    write_images(tmp_path / "images", 6)
    records = [{**record("<image>\nWhat?", f"It is {i}.", f"{i:03d}.png"), "id": i} for i in range(6)]
    return list(prepared(tmp_path, [*records, {**record("Why?", "So.", None), "id": 6}], encoder).samples)


def pixels(path: Path) -> torch.Tensor:
    return torch.full((1, 3, 2, 2), float(path.stem))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_their_own_samples_images_whatever_the_workers(workers: int, samples: list[Sample]) -> None:
    plan = [[3, 6, 0], [6], [5, 1]]
    loaded = list(load_batches(Samples(samples, pixels), plan, workers))
    assert [item.uids for item in loaded] == [tuple(str(i) for i in step) for step in plan]
    assert loaded[1].batch.pixel_values is None
    for item, step in zip(loaded, plan, strict=True):
        shown = [] if item.batch.pixel_values is None else item.batch.pixel_values[:, 0, 0, 0].tolist()
        assert shown == [float(i) for i in step if i != 6]
        for row, i in enumerate(step):
            real = item.batch.attention_mask[row]
            assert item.batch.input_ids[row][real].tolist() == list(samples[i].input_ids)
            assert item.batch.labels[row][real].tolist() == list(samples[i].labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_went_bad_since_the_check_is_named(workers: int, samples: list[Sample]) -> None:
    def load(path: Path) -> torch.Tensor:
        if path.stem == "002":
            raise DataError("D104", f"image {path} cannot be read.")
        return pixels(path)

    def uids() -> Iterator[tuple[str, ...]]:
        yield from (item.uids for item in load_batches(Samples(samples, load), [[0], [1, 2]], workers))

    batches = uids()
    assert next(batches) == ("0",)
    with pytest.raises(DataError, match=r'sample "2".*002') as caught:
        next(batches)
    assert caught.value.code == "D104"


def test_empty_share_of_a_step_gives_a_batch_without_loss(samples: list[Sample]) -> None:
    text_first = [samples[6], *samples[:6]]
    item = next(load_batches(Samples(text_first, pixels), [[]], 0))
    assert (item.uids, item.batch.num_supervised, len(item.batch.input_ids)) == ((), 0, 1)
    assert item.batch.pixel_values is not None  # the graph of a process with images


def test_loading_leaves_the_global_generator_alone(samples: list[Sample]) -> None:
    before = torch.random.get_rng_state()
    list(load_batches(Samples(samples, pixels), [[0], [1]], 0))
    assert torch.equal(before, torch.random.get_rng_state())
