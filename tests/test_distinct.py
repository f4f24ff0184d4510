"""Equal questions are asked once, and every one of them gets the answer and its place on the progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_bundle import FakeBundle
from PIL import Image

from vlmpeft.decode import Request
from vlmpeft.eval import pope
from vlmpeft.eval.distinct import answer_distinct


def test_equal_requests_are_asked_once_and_all_answered(data_dir: Path) -> None:
    first, second = sorted((data_dir / "images").glob("*.png"))[:2]
    asked = [Request((first,), "a"), Request((first,), "b"), Request((first,), "a"), Request((second,), "a")]
    asked += [Request((), "a"), Request((Path(str(first)),), "b"), Request((first,), "a", ("x", "y"))]
    bundle, told = FakeBundle({"a": "A", "b": "B"}), list[Any]()
    found = answer_distinct(bundle, asked, on_batch=told.extend, batch_size=2)
    assert [answer.text for answer in found] == ["A", "B", "A", "A", "A", "B", "A"]
    assert bundle.prompts == ["a", "b", "a", "a", "a"]
    assert sorted(told, key=lambda pair: pair[0]) == list(enumerate(found))


def test_pictures_in_memory_are_equal_only_if_they_are_the_same(data_dir: Path) -> None:
    one, other = (Image.new("RGB", (8, 8), "red") for _ in range(2))
    bundle = FakeBundle()
    answer_distinct(bundle, [Request((one,), "a"), Request((other,), "a"), Request((one,), "a")])
    assert len(bundle.prompts) == 2


def test_popes_files_share_their_positive_questions(data_dir: Path) -> None:
    row = {"image": "000.png", "text": "Is there a red square?", "label": "yes"}
    questions = [{**row, "question_id": 1, "setting": s} for s in ("random", "popular", "adversarial")]
    questions.append({**row, "question_id": 2, "setting": "random", "text": "Is there a dog?", "label": "no"})
    bundle = FakeBundle({"dog": "No"}, "Yes")
    answers, metrics = pope.evaluate(bundle, questions, data_dir / "images", progress=False)
    assert [(a["setting"], a["text"]) for a in answers] == [
        ("random", "Yes"), ("popular", "Yes"), ("adversarial", "Yes"), ("random", "No"),
    ]  # fmt: skip
    assert (len(bundle.prompts), metrics["n"]) == (2, 4)
