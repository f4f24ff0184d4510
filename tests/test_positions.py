"""Which image tokens are steered: closed formulas, several images, any padding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vlmpeft.errors import ConfigError
from vlmpeft.steering import positions
from vlmpeft.steering.layers import parse_layers

SIZES = (1, 2, 3, 7, 10, 49, 144, 576, 728, 729)


def row(*runs: int, left: int = 3, right: int = 4) -> Tensor:
    """(1, s) bool: runs of image tokens with a text token between them."""
    flags: list[bool] = [False] * left
    for run in runs:
        flags += [True] * run + [False]
    return torch.tensor([flags + [False] * right])


def taken(text: str, mask: Tensor, sizes: Sequence[int] | None = None) -> list[int]:
    return positions.chosen(positions.parse(text), mask, sizes)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("share", [0.01, 0.12, 0.25, 0.5, 1.0])
def test_a_ratio_takes_evenly_spread_tokens_of_the_image(n: int, share: float) -> None:
    count = max(1, round(share * n))
    expected = [int((i + 0.5) * n / count) for i in range(count)]
    assert [i - 3 for i in taken(f"ratio:{share}", row(n))] == expected


@pytest.mark.parametrize("text", ["ratio:0", "ratio:0.0"])
def test_a_ratio_of_zero_takes_none(text: str) -> None:
    assert taken(text, row(10, 1)) == []


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("count", [1, 9, 400, 5000])
def test_uniform_takes_that_many_tokens_or_all(n: int, count: int) -> None:
    assert len(taken(f"uniform:{count}", row(n))) == min(n, count)


def test_the_published_choice_of_a_siglip_image_is_its_first_four_and_last_five_tokens() -> None:
    assert taken("first_last:4,5", row(728)) == [3 + i for i in (0, 1, 2, 3, 723, 724, 725, 726, 727)]


@pytest.mark.parametrize(("n", "expected"), [(8, list(range(8))), (6, [0, 1, 2, 3, 4, 5]), (5, [0, 1, 3, 4]), (1, [])])
def test_first_and_last_take_at_most_half_of_a_small_image_each(n: int, expected: list[int]) -> None:
    assert [i - 3 for i in taken("first_last:4,5", row(n))] == expected


def test_every_image_of_a_row_is_steered_by_itself() -> None:
    assert taken("first_last:1,1", row(6, 6)) == [3, 8, 10, 15]


def test_images_side_by_side_are_parted_by_the_tokens_of_one() -> None:
    assert taken("first_last:1,1", row(12), sizes=(6, 6)) == [3, 8, 9, 14]


@pytest.mark.parametrize("text", ["all", "ratio:0.3", "first_last:2,3", "uniform:4", "random:0.4,1"])
def test_padding_moves_the_choice_and_changes_nothing_else(text: str) -> None:
    shifted = [i - 11 for i in taken(text, row(10, left=11, right=0))]
    assert shifted == [i - 3 for i in taken(text, row(10))]


@pytest.mark.parametrize("text", ["all", "ratio:0.3", "first_last:2,3", "uniform:4", "random:0.4,1", "random:5"])
def test_a_row_without_an_image_has_no_position(text: str) -> None:
    assert taken(text, row()) == []


def test_random_draws_the_share_by_its_seed() -> None:
    drawn = [tuple(taken(f"random:0.25,{seed}", row(100))) for seed in range(20)]
    assert all(len(d) == 25 for d in drawn)
    assert len(set(drawn)) == 20
    counts = torch.zeros(110)
    for d in drawn:
        counts[list(d)] += 1
    assert counts[3:103].max() <= 13  # of 20 draws, 5 expected: nothing is preferred


def test_text_is_counted_over_the_whole_row() -> None:
    mask = ~row(4)  # 3 tokens, the image, 5 tokens
    found = positions.chosen_in_rows(positions.first_last(2, 2), mask)[0].nonzero().flatten().tolist()
    assert found == [0, 1, 10, 11]


@pytest.mark.parametrize(
    "text", ["random:0,1", "ratio:1.5", "uniform:0", "first_last:0,0", "first:4", "ratio:.", "random:2,1"]
)
def test_a_wrong_choice_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ConfigError, match=f"positions='{text}'"):
        positions.parse(text)


def test_layers_by_name() -> None:
    assert parse_layers("all", 5) == [0, 1, 2, 3, 4]
    assert parse_layers("every:2", 5) == [0, 2, 4]
    assert (parse_layers("shallow", 7), parse_layers("middle", 7), parse_layers("deep", 7)) == (
        [0, 1],
        [2, 3, 4],
        [5, 6],
    )
    assert parse_layers([-1, 0], 7) == [0, 6]
    for wrong in ("every:0", "top", [7], []):
        with pytest.raises(ConfigError, match="layers="):
            parse_layers(wrong, 7)


def test_images_side_by_side_are_steered_each_by_itself() -> None:
    visual = torch.tensor([[False] + [True] * 11, [True] * 4 + [False] * 8])
    found = positions.chosen(positions.parse("first_last:1,1"), visual, (5, 6, 4))
    assert found[0].nonzero().flatten().tolist() == [1, 5, 6, 11]
    assert found[1].nonzero().flatten().tolist() == [0, 3]
    apart = positions.chosen(positions.parse("ratio:0.4"), visual, (5, 6, 4))
    alone = [positions.chosen(positions.parse("ratio:0.4"), torch.ones(1, n, dtype=torch.bool))[0] for n in (5, 6, 4)]
    assert torch.equal(apart[visual], torch.cat(alone))
