"""Collation: padding on either side, labels, turns and the index of supervised positions."""

from __future__ import annotations

from array import array

import pytest
import torch

from vlmpeft.batch import IGNORE, Batch, collate, supervised_index
from vlmpeft.template import Encoding

LONG = Encoding([1, 2, 3, 4], [IGNORE, IGNORE, 3, 4], [0, 0, 0, 0])
SHORT = Encoding([5, 6], [IGNORE, 6], [0, 0])


@pytest.mark.parametrize("side", ["right", "left"])
def test_samples_are_padded_on_the_side_asked_for(side: str) -> None:
    batch = collate([LONG, SHORT], side=side)
    real = [[True] * 4, [True, True, False, False] if side == "right" else [False, False, True, True]]
    assert batch.attention_mask.tolist() == real
    assert batch.input_ids[1][batch.attention_mask[1]].tolist() == [5, 6]
    assert batch.labels[1][batch.attention_mask[1]].tolist() == [IGNORE, 6]
    assert batch.labels[~batch.attention_mask].tolist() == [IGNORE] * 2
    assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.turns, batch.pixel_values) == (None, None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_supervised_index_points_at_the_position_before_each_label(side: str) -> None:
    batch = collate([LONG, SHORT], side=side)
    assert batch.supervised is not None
    assert batch.labels.flatten()[batch.supervised + 1].tolist() == [3, 4, 6]
    assert batch.input_ids.flatten()[batch.supervised].tolist() == [2, 3, 5]
    assert batch.num_supervised == 3


def test_label_at_the_first_position_predicts_nothing_and_rows_do_not_leak() -> None:
    labels = torch.tensor([[IGNORE, 2], [7, 8]])  # 7 would be predicted by the last position of the row before
    assert supervised_index(labels).tolist() == [0, 2]
    assert supervised_index(torch.full((2, 3), IGNORE)).tolist() == []


def test_turns_are_kept_where_any_sample_has_them() -> None:
    packed = Encoding([1, 2, 3], [IGNORE, 2, 3], [0, 1, 2])
    batch = collate([packed, SHORT])
    assert batch.turns is not None
    assert batch.turns.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_compact_rows_collate_as_lists_do() -> None:
    compact = Encoding(*(array("i", row) for row in (LONG.input_ids, LONG.labels, LONG.turns)))  # type: ignore[arg-type]
    expected, found = collate([LONG, SHORT]), collate([compact, SHORT])
    for name, tensor in expected.tensors().items():
        assert torch.equal(tensor, found.tensors()[name])


def test_images_are_stacked_and_every_tensor_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate([LONG], [torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    assert batch.pixel_values is not None
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [0, 1]
    moved = batch.to("meta")
    assert all(t.device.type == "meta" for t in moved.tensors().values())
    assert moved.tensors().keys() == batch.tensors().keys()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t + 1)  # page-locked memory needs a GPU
    pinned = batch.pin_memory()
    assert all(torch.equal(pinned.tensors()[k], t + 1) for k, t in batch.tensors().items())


def test_a_bare_batch_has_no_supervised_tokens() -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(ids, ids.bool(), ids)
    assert batch.num_supervised == 0
    assert set(batch.tensors()) == {"input_ids", "attention_mask", "labels"}
