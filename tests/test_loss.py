"""The answer loss is the cross entropy of supervised tokens, whatever the batch around them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import make_bundle, make_trainer

from vlmpeft.batch import IGNORE, supervised_index
from vlmpeft.data import load_batches
from vlmpeft.loss import answer_loss


def labels_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([[IGNORE if v < 0 else v for v in row] for row in rows])


def test_uniform_logits_give_log_vocabulary() -> None:
    labels = labels_of([-1, -1, 3, 0], [-1, 2, -1, -1])
    index = supervised_index(labels)
    assert index.tolist() == [1, 2, 4]
    assert answer_loss(torch.zeros(3, 7), labels, index).item() == pytest.approx(math.log(7), abs=1e-6)


def test_equals_the_formula_by_hand() -> None:
    labels = labels_of([-1, 1, 0])
    logits = torch.tensor([[0.5, 2.0, -1.0], [1.0, 0.0, 3.0]])
    by_hand = [math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(logits.tolist(), (1, 0), strict=True)]
    index = supervised_index(labels)
    assert answer_loss(logits, labels, index).item() == pytest.approx(sum(by_hand) / 2, abs=1e-6)
    assert answer_loss(logits, labels, index, 5).item() == pytest.approx(sum(by_hand) / 5, abs=1e-6)
    assert answer_loss(logits, labels, index, torch.tensor(5)).item() == pytest.approx(sum(by_hand) / 5, abs=1e-6)


def test_equals_the_shifted_loss_over_all_positions() -> None:
    """As transformers' causal LMs compute it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 11, generator=generator)
    labels = torch.where(
        torch.rand(3, 9, generator=generator) < 0.4, torch.randint(11, (3, 9), generator=generator), IGNORE
    )
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    index = supervised_index(labels)
    torch.testing.assert_close(answer_loss(logits.flatten(0, 1)[index], labels, index), shifted)


def test_parts_divided_by_the_whole_add_up() -> None:
    labels = labels_of([-1, 1, 2, 0], [-1, -1, -1, 3])
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    index = supervised_index(labels)
    whole = answer_loss(logits, labels, index)
    first, second = (supervised_index(row[None]) for row in labels)
    parts = answer_loss(logits[:3], labels[:1], first, 4) + answer_loss(logits[3:], labels[1:], second, 4)
    torch.testing.assert_close(parts, whole)


def test_nothing_supervised_is_zero_with_a_graph() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = answer_loss(logits, labels_of([-1, -1]), torch.zeros(0, dtype=torch.int64), 0 or None)
    assert loss.item() == 0
    loss.backward()


def test_half_precision_logits_are_summed_in_fp32() -> None:
    labels = torch.full((1, 3001), 1)
    index = supervised_index(labels)
    loss = answer_loss(torch.zeros(3000, 4, dtype=torch.bfloat16), labels, index)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


def test_logits_at_supervised_positions_equal_the_full_ones(tiny_recipe: Path, tmp_path: Path) -> None:
    """On padded batches with and without images; and so does the loss."""
    trainer = make_trainer(tiny_recipe, "instruct", tmp_path, "stages.instruct.batch.group=none")
    model = make_bundle(tiny_recipe).model.eval()
    indices = [[0, 5, 14], [12, 13], [3]]
    for loaded in load_batches(trainer.samples, indices, 0):
        inputs = loaded.batch.tensors()
        index = inputs["supervised"]
        with torch.no_grad():
            part = model(**inputs)
            full = model(**{k: v for k, v in inputs.items() if k not in ("labels", "supervised")})
        torch.testing.assert_close(part.logits, full.logits.flatten(0, 1)[index], rtol=0, atol=1e-6)
        labels = inputs["labels"]
        shifted = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        torch.testing.assert_close(part.loss, shifted)
