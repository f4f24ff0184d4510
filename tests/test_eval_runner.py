"""What the benchmarks share: asking a model, writing results, the command as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from eval_questions import QUESTIONS, write_pictures
from PIL import Image

import vlmpeft
from vlmpeft.decode import Answer, Request
from vlmpeft.errors import NumericError, VlmpeftError, run_command
from vlmpeft.eval import pope, runner
from vlmpeft.eval.paths import resolve_images
from vlmpeft.eval.rows import read_rows, write_json, write_rows


class FakeBundle:
    """Says what it is told of each of QUESTIONS, in batches, and remembers how it was asked."""

    def __init__(self, texts: Sequence[str], margin: float = 0.5) -> None:
        self.texts, self.margin = texts, margin
        self.requests: list[Request] = []
        self.batches: list[int] = []
        self.asked: dict[str, Any] = {}

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 16,
        batch_size: int = 16,
        contrast: tuple[str, str] | None = None,
        on_batch: Callable[[Any], None] | None = None,
    ) -> list[Answer]:
        self.requests = list(requests)
        self.asked = {"max_new_tokens": max_new_tokens, "contrast": contrast}
        answers = [Answer(self._text(request.prompt), self.margin if contrast else None) for request in requests]
        order = list(enumerate(answers))[::-1]  # the last question first: an index belongs to a question, not a place
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            self.batches.append(len(batch))
            if on_batch is not None:
                on_batch(batch)
        return answers

    def _text(self, prompt: str) -> str:
        return next((t for q, t in zip(QUESTIONS, self.texts, strict=True) if str(q["text"]) in prompt), "Yes")

    def blank_image(self, image: Any) -> Image.Image:
        with Image.open(image) as opened:
            return Image.new("RGB", opened.size, (122, 116, 104))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "images")


TEXTS = [" Yes\n", "No", "Yes, a cow.", "no"]


def test_every_question_is_asked_about_its_image_with_the_suffix(images: Path) -> None:
    bundle = FakeBundle(TEXTS)
    answers = runner.ask(
        bundle,
        QUESTIONS,
        images,
        suffix=" Why?",
        batch_size=3,
        max_new_tokens=9,
        contrast=("Yes", "No"),
        progress=False,
    )
    paths = resolve_images(QUESTIONS, images)
    assert [r.images for r in bundle.requests] == [(path,) for path in paths]
    assert [r.prompt for r in bundle.requests] == [f"{q['text']} Why?" for q in QUESTIONS]
    assert bundle.asked == {"max_new_tokens": 9, "contrast": ("Yes", "No")}
    assert bundle.batches == [3, 1]
    assert answers[0] == {
        **{"question_id": 5, "image": "a.png", "prompt": "Is there a cat? Why?"},
        **{"text": "Yes", "margin": 0.5},
    }
    assert [a["text"] for a in answers] == ["Yes", "No", "Yes, a cow.", "no"]


def test_suffix_already_in_the_question_is_not_repeated(images: Path) -> None:
    bundle = FakeBundle(TEXTS)
    runner.ask(bundle, [{**QUESTIONS[0], "text": "Cat? Why?"}], images, suffix=" Why?", progress=False)
    assert bundle.requests[0].prompt == "Cat? Why?"


def test_setting_is_carried_into_the_answers(images: Path) -> None:
    answers = runner.ask(FakeBundle(TEXTS), [{**QUESTIONS[0], "setting": "s"}], images, suffix="", progress=False)
    assert answers[0]["setting"] == "s"


def test_blank_pictures_have_the_size_of_their_image_and_are_shared_by_size(images: Path) -> None:
    bundle = FakeBundle(TEXTS)
    runner.ask(bundle, QUESTIONS, images, suffix="", ablate="blank", progress=False)
    pictures = [r.images[0] for r in bundle.requests]
    assert [p.size for p in pictures] == [(4, 3), (4, 3), (2, 5), (4, 3)]
    assert {p.getpixel((0, 0)) for p in pictures} == {(122, 116, 104)}
    assert len({id(p) for p in pictures}) == 2


def test_progress_shows_the_running_accuracy(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate(progress: bool) -> str:
        pope.evaluate(FakeBundle(TEXTS), QUESTIONS, images, batch_size=3, progress=progress)
        return capsys.readouterr().err

    assert "4/4" in (shown := evaluate(progress=True))
    assert "accuracy 0.500" in shown
    assert evaluate(progress=False) == ""


@pytest.mark.parametrize("margin", [float("nan"), float("inf")])
def test_margin_that_is_not_finite_is_an_error(margin: float, images: Path) -> None:
    with pytest.raises(NumericError, match="N301"):
        pope.evaluate(FakeBundle(TEXTS, margin), QUESTIONS, images, progress=False)


def test_pope_in_process_returns_answers_and_the_metrics_of_scoring_them(images: Path) -> None:
    answers, metrics = pope.evaluate(FakeBundle(TEXTS), QUESTIONS, images, progress=False)
    assert [a["parsed"] for a in answers] == ["yes", "no", "yes", "no"]
    assert set(answers[0]) == {"question_id", "image", "prompt", "text", "parsed", "label", "margin"}
    assert (metrics["accuracy"], metrics["auc"], metrics["n"]) == (0.5, 0.5, 4)
    assert pope.score(QUESTIONS, answers[::-1]) == metrics


def test_written_rows_are_whole_readable_and_leave_no_temporary_file(tmp_path: Path) -> None:
    rows = [{"text": "\u00e9\u2028\U0001f600"}, {"text": "\ud800"}]
    write_rows(tmp_path / "a.jsonl", rows)
    write_json(tmp_path / "m.json", {"accuracy": 0.5, "n": 2})
    assert read_rows(tmp_path / "a.jsonl") == rows
    assert "\u00e9" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert list(json.loads((tmp_path / "m.json").read_text())) == ["accuracy", "n"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "m.json"]


def test_failed_write_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.json"
    write_json(path, {"n": 1})

    def refuse(*_: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises((OSError, VlmpeftError)):
        write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]


def run_pope(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, list[object]]:
    loaded: list[object] = []

    def load(directory: str, device: str) -> FakeBundle:
        loaded.append((directory, device))
        return FakeBundle(TEXTS)

    monkeypatch.setattr(vlmpeft, "load", load, raising=False)
    arguments = ["model=M", f"images={images}", f"out={tmp_path / 'deep' / 'out'}", *more]
    return run_command(pope.main, arguments), loaded


def test_pope_command_writes_answers_and_metrics_and_prints_a_table(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "q.jsonl"
    write_rows(questions, QUESTIONS)
    assert run_pope(tmp_path, images, monkeypatch, f"questions={questions}", "ablate=blank") == (0, [("M", "auto")])
    out = tmp_path / "deep" / "out"
    answers = read_rows(out / "answers.jsonl")
    assert [a["question_id"] for a in answers] == [5, 6, 7, 8]
    assert answers[2]["prompt"] == "Is there a cow?" + pope.SUFFIX
    metrics = json.loads((out / "metrics.json").read_text())
    assert (
        metrics.items()
        >= {"model": "M", "parser": "official", "suffix": pope.SUFFIX, "ablate": "blank", "n": 4}.items()
    )
    assert metrics.items() >= pope.score(QUESTIONS, answers).items()
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["setting", *pope.COLUMNS]
    assert table[1].split()[:3] == ["all", "4", "0.5000"]


def test_pope_command_keeps_settings_apart_and_its_answers_score_the_same(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = f"{tmp_path / 'random.json'},{tmp_path / 'popular.json'}"
    for file in files.split(","):
        write_rows(Path(file), QUESTIONS)
    assert run_pope(tmp_path, images, monkeypatch, f"questions={files}")[0] == 0
    assert "mean accuracy 0.5000, mean F1 0.5000" in capsys.readouterr().out
    out = tmp_path / "deep" / "out"
    written = json.loads((out / "metrics.json").read_text())
    assert list(written["settings"]) == ["random", "popular"]
    assert [a["setting"] for a in read_rows(out / "answers.jsonl")] == ["random"] * 4 + ["popular"] * 4
    assert run_command(pope.main, [f"questions={files}", f"answers={out / 'answers.jsonl'}"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert written.items() >= scored.items()


@pytest.mark.parametrize(
    ("row", "more", "status"),
    [
        ({**QUESTIONS[0], "image": "absent.png"}, (), 3),
        ({**QUESTIONS[0], "image": "../q.jsonl"}, (), 3),
        ({**QUESTIONS[0], "label": "perhaps"}, (), 8),
        ({"question_id": 1}, (), 8),
        (QUESTIONS[0], ("batch_size=none",), 2),
        (QUESTIONS[0], ("colour=red",), 2),
        (QUESTIONS[0], ("ablate=blur",), 2),
        (QUESTIONS[0], ("compare=absent",), 2),
    ],
)
def test_faults_are_found_before_the_model_is_loaded(
    row: dict[str, Any],
    more: tuple[str, ...],
    status: int,
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = tmp_path / "q.jsonl"
    write_rows(questions, [row])
    assert run_pope(tmp_path, images, monkeypatch, f"questions={questions}", *more) == (status, [])


def test_output_folder_under_a_file_is_refused_before_the_model_is_loaded(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    (tmp_path / "deep").write_text("a file")
    assert run_pope(tmp_path, images, monkeypatch, f"questions={tmp_path / 'q.jsonl'}") == (2, [])


def test_table_aligns_its_columns() -> None:
    assert runner.table([["name", "n"], ["a", "100"]]) == "name    n\na     100"
