"""Asking in batches that are kept as they come: what is planned, kept, and missed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vlmpeft.decode import Answer, Request
from vlmpeft.errors import EvalError, NumericError
from vlmpeft.eval.answer_log import AnswerLog, open_folder
from vlmpeft.eval.asking import Remembering, batches_of
from vlmpeft.eval.team import Team


def test_a_batch_holds_questions_about_the_same_images_longest_first() -> None:
    one, two = (Path("1.png"),), (Path("2.png"),)
    requests = [Request(one, "aa"), Request(two, "a"), Request(one, "a"), Request(two, "aaa"), Request((), "aa")]
    assert batches_of(requests, 2) == [[3, 1], [0, 2], [4]]
    assert batches_of(requests, 4) == [[3, 1, 0, 2], [4]]
    assert batches_of([], 4) == []


class Counting:
    """Says how often it was asked, and remembers what."""

    def __init__(self, margin: float = 0.5) -> None:
        self.margin, self.asked = margin, list[str]()

    def answer(self, requests: Sequence[Request], **_: object) -> list[Answer]:
        self.asked += [request.prompt for request in requests]
        return [Answer(request.prompt.upper(), self.margin) for request in requests]

    def blank_image(self, image: Any) -> Any:
        raise AssertionError


def remembering(folder: Path, bundle: Any = None) -> Remembering:
    folder.mkdir(exist_ok=True)
    open_folder(folder, {}, False)
    return Remembering(bundle or Counting(), AnswerLog(folder, Team()))


def test_a_second_round_of_questions_is_kept_apart_from_the_first(tmp_path: Path) -> None:
    """A benchmark of a user's own may ask twice, the second time about what was said the first."""
    rounds = [[Request((), "a"), Request((), "b")], [Request((), "c"), Request((), "d")]]
    first = remembering(tmp_path)
    expected = [first.answer(asked, batch_size=1) for asked in rounds]
    assert [[a.text for a in answers] for answers in expected] == [["A", "B"], ["C", "D"]]
    silent = Counting()
    again = remembering(tmp_path, silent)
    assert [again.answer(asked, batch_size=1) for asked in rounds] == expected
    assert silent.asked == []


def test_progress_counts_what_was_answered_before(tmp_path: Path) -> None:
    requests = [Request((), prompt) for prompt in ("ccc", "bb", "a")]
    remembering(tmp_path).answer(requests, batch_size=2)
    seen: list[tuple[int, str]] = []
    remembering(tmp_path).answer(
        requests, batch_size=2, on_batch=lambda pairs: seen.extend((index, answer.text) for index, answer in pairs)
    )
    assert seen == [(0, "CCC"), (1, "BB"), (2, "A")]


@pytest.mark.parametrize("margin", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_an_error_and_not_kept(margin: float, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="N301"):
        remembering(tmp_path, Counting(margin)).answer([Request((), "a")])
    mended = Counting()
    remembering(tmp_path, mended).answer([Request((), "a")])
    assert mended.asked == ["a"]


def test_answers_of_a_process_that_writes_elsewhere_are_missed(tmp_path: Path) -> None:
    remembering(tmp_path)
    alone = Remembering(Counting(), AnswerLog(tmp_path, Team(rank=0, size=2)))
    with pytest.raises(EvalError, match=r"V604.*1 of 2 batches"):
        alone.answer([Request((), "a"), Request((), "b")], batch_size=1)
