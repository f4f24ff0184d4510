"""`method=loglik`: the likeliest candidate is the answer, no parser has to find it, and the metrics name it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from eval_questions import QUESTIONS, write_pictures
from native import native_directory
from PIL import Image

from vlmpeft.build import Bundle
from vlmpeft.checkpoint import load
from vlmpeft.decode import Answer, Request
from vlmpeft.errors import ConfigError, EvalError, run_command
from vlmpeft.eval import choice, mme, mmmu, pope
from vlmpeft.eval.choices_ask import evaluate
from vlmpeft.eval.rows import read_rows


class Likely:
    """Finds the `favourite`-th candidate the likeliest; says "(B)" where it is given none."""

    def __init__(self, favourite: int) -> None:
        self.favourite, self.requests = favourite, list[Request]()

    def answer(self, requests: Sequence[Request], **_: object) -> list[Answer]:
        self.requests += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        if not request.candidates:
            return Answer("(B)")
        at = min(self.favourite, len(request.candidates) - 1)
        logliks = tuple(-0.5 if i == at else -1.0 - i for i in range(len(request.candidates)))
        return Answer(request.candidates[at], logliks[0] - logliks[1], logliks)

    def blank_image(self, image: Any) -> Image.Image:
        raise AssertionError


def test_pope_offers_yes_and_no_and_keeps_both_likelihoods(tmp_path: Path) -> None:
    images, bundle = write_pictures(tmp_path / "images"), Likely(1)
    answers, metrics = pope.evaluate(bundle, QUESTIONS, images, progress=False, method="loglik")
    assert {request.candidates for request in bundle.requests} == {("Yes", "No")}
    assert not any(request.per_character for request in bundle.requests)
    assert answers[0].items() >= {"text": "No", "parsed": "no", "logliks": {"Yes": -1.0, "No": -0.5}}.items()
    assert (metrics["accuracy"], metrics["unparsable"], metrics["auc"]) == (0.5, 0, 0.5)
    pope.evaluate(bundle, QUESTIONS, images, progress=False, method="loglik_norm")
    assert all(request.per_character for request in bundle.requests[4:])


def test_generation_offers_nothing(tmp_path: Path) -> None:
    bundle = Likely(0)
    answers, _ = pope.evaluate(bundle, QUESTIONS, write_pictures(tmp_path / "images"), progress=False)
    assert {request.candidates for request in bundle.requests} == {()}
    assert "logliks" not in answers[0]


def test_mme_offers_yes_and_no(tmp_path: Path) -> None:
    images, bundle = write_pictures(tmp_path / "images"), Likely(0)
    rows = [{**q, "category": "existence", "image": "a.png"} for q in QUESTIONS[:2]]
    _, metrics = mme.benchmark({"parser": "official"}).evaluate(bundle, rows, images, progress=False, method="loglik")
    assert {request.candidates for request in bundle.requests} == {("Yes", "No")}
    assert metrics["accuracy"] == 0.5


ROWS = [
    {"id": "a", "question": "Which?", "options": ["red", "green", "blue"], "answer": "C"},
    {"id": "b", "question": "Which?", "options": ["same", "same"], "answer": "B"},
]


@pytest.mark.parametrize("candidates", ["letters", "texts"])
def test_a_choice_offers_letters_or_texts_and_answers_by_letter(candidates: str) -> None:
    bundle, items = Likely(2), [choice.item_of(row) for row in ROWS]
    judge = choice.BENCHMARK.judge("strict")
    answers, metrics = evaluate(bundle, items, judge, progress=False, method="loglik", candidates=candidates)
    offered = [request.candidates for request in bundle.requests]
    assert (
        offered
        == {"letters": [("A", "B", "C"), ("A", "B")], "texts": [("red", "green", "blue"), ("same", "same")]}[candidates]
    )
    assert [a["parsed"] for a in answers] == ["C", "B" if candidates == "letters" else "A"]  # of equals the first
    assert answers[0]["logliks"] == {"A": -1.0, "B": -2.0, "C": -0.5}
    assert (metrics["unparsable"], metrics["by_chance"]) == (0, 0)


def test_no_parser_reads_a_chosen_letter() -> None:
    """LLaVA's rule knows A to E; a sixth option can be chosen nevertheless."""
    row = {"id": "a", "question": "Which?", "options": [*"uvwxyz"], "answer": "F"}
    judge = choice.BENCHMARK.judge("scienceqa")
    _, metrics = evaluate(Likely(5), [choice.item_of(row)], judge, progress=False, method="loglik")
    assert metrics["accuracy"] == 1.0


def test_open_questions_are_generated_and_parsed_as_ever() -> None:
    row = {
        "id": "validation_Math_1",
        "question": "How many?",
        "options": "[]",
        "answer": "(B)",
        "question_type": "open",
    }
    bundle = Likely(0)
    judge = mmmu.BENCHMARK.judge("official")
    answers, metrics = evaluate(bundle, [mmmu.item_of(row)], judge, progress=False, method="loglik")
    assert bundle.requests[0].candidates == ()
    assert "logliks" not in answers[0]
    assert metrics["accuracy"] == 1.0


class Talker(Likely):
    """Generates whatever it is offered."""

    def _answer(self, request: Request) -> Answer:
        return Answer("Yes")


def test_a_model_without_likelihoods_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"V605.*question 5.*method=generate"):
        pope.evaluate(Talker(0), QUESTIONS, write_pictures(tmp_path / "images"), progress=False, method="loglik")


def test_unknown_methods_and_candidates_are_refused_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"C102.*no method 'loglikk'; did you mean 'loglik'\?"):
        pope.evaluate(Likely(0), QUESTIONS, write_pictures(tmp_path / "images"), progress=False, method="loglikk")
    data = tmp_path / "choice.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = ["model=M", f"data={data}", f"out={tmp_path / 'out'}"]
    assert run_command(choice.main, [*common, "method=logik"]) == 2
    assert run_command(choice.main, [*common, "candidates=text"]) == 2
    error = capsys.readouterr().err
    assert "no method 'logik'; did you mean 'loglik'?" in error
    assert "no candidates 'text'; did you mean 'texts'?" in error


def test_the_command_asks_a_real_model_and_goes_on_after_an_interruption(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = native_directory(tmp_path / "model")
    common = [f"model={model}", f"questions={data_dir / 'pope.jsonl'}", f"images={data_dir / 'images'}"]
    common += ["device=cpu", "batch_size=5", "method=loglik"]
    assert run_command(pope.main, [*common, f"out={tmp_path / 'straight'}"]) == 0
    metrics = json.loads((tmp_path / "straight" / "metrics.json").read_text())
    assert metrics["method"] == "loglik"
    rows = read_rows(tmp_path / "straight" / "answers.jsonl")
    expected = load(model, "cpu").answer(
        [Request((data_dir / "images" / row["image"],), row["prompt"], ("Yes", "No")) for row in rows]
    )
    for row, answer in zip(rows, expected, strict=True):
        assert list(row["logliks"].values()) == pytest.approx(answer.logliks, abs=1e-4)
        assert row["text"] == max(row["logliks"], key=row["logliks"].get)
        assert row["margin"] == pytest.approx(row["logliks"]["Yes"] - row["logliks"]["No"])

    original, calls = Bundle.answer, 0

    def answer(self: Bundle, requests: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, requests, **options)

    monkeypatch.setattr(Bundle, "answer", answer)
    assert run_command(pope.main, [*common, f"out={tmp_path / 'cut'}"]) == 130
    assert run_command(pope.main, [*common, f"out={tmp_path / 'cut'}"]) == 0
    for name in ("answers.jsonl", "metrics.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
