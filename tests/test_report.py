"""The report of a run: well-formed, complete, escaped, self-contained, and written whatever is missing or broken."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmpeft.errors import CheckpointError
from vlmpeft.report import CARDS, choose, thumbnail, write_report
from vlmpeft.report_data import duration, interval

ALERT = "<script>alert(1)</script>"
VOID = {"meta", "input", "img", "br", "hr", "link"}
SECTIONS = {"evaluation", "retention", "training", "parameters", "samples", "recipe", "versions"}


class Page(HTMLParser):
    """Collects tags, ids, text and images; fails on a tag closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes the wrong tag"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + " "


def metrics(accuracy: float, **more: Any) -> dict[str, Any]:
    kinds = {"count": {"accuracy": accuracy - 0.1, "n": 40}, "<colour>": {"accuracy": accuracy + 0.05, "n": 60}}
    return {
        "name": "pope",
        "accuracy": accuracy,
        "f1": accuracy - 0.02,
        "yes_ratio": 0.48,
        "n": 100,
        "categories": kinds,
    } | more


def part(part: str, name: str, trainable: int, total: int) -> dict[str, Any]:
    return {"part": part, "name": name, "trainable": trainable, "total": total}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two stages with everything a report can show."""
    Image.new("RGB", (800, 500), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    rows: list[dict[str, Any]] = []
    for stage, rate in (("pretrain", {"projector": 1e-3}), ("instruct", {"lora": 4e-4, "projector": 2e-5})):
        for step in range(1, 41):
            row = {"stage": stage, "step": step, "loss": 3 / step, "lr": max(rate.values()), "lrs": rate}
            row |= {"grad_norm": 1.5, "tokens_per_s": 900.0}
            rows.append(row)
        rows.append({"stage": stage, "step": 40, "eval_loss": 0.5})
    rows[3]["loss"] = math.nan
    projector = part("projector", "mlp", 500, 500)
    stages = [
        {"name": "pretrain", "steps": 40, "seconds": 61.0, "samples": 320, "final_loss": 1.234, "best_step": None,
         "trainable": [part("vision", "clip", 0, 1000), projector, part("language", "lora", 0, 8000)]},
        {"name": "instruct", "steps": 40, "seconds": 4000.0, "samples": 640, "final_loss": 0.567, "best_step": 30,
         "trainable": [projector, part("language", "lora", 160, 8000), part("language", "norm", 40, 8000),
                       {"part": "steered", "trainable": 0, "total": 0, "note": "64 without biases"}]},
    ]  # fmt: skip
    summary = {
        "title": f"Run {ALERT}",
        "stages": stages,
        "versions": {"torch": "2.14.1"},
        "data": {"records": 99, "used": 97, "skipped": 2},
    }
    samples = [
        {"image": "red.png", "question": ALERT, "label": "red", "before": "blue", "after": "red",
         "category": "colour", "correct": True},
        {"image": str(tmp_path / "broken.png"), "question": "Broken?", "label": "yes", "after": "no", "correct": False},
        {"image": "absent.png", "question": "Absent?", "label": "yes", "after": "yes"},
    ]  # fmt: skip
    evaluation = {"before": metrics(0.61), "after": [metrics(0.863)], "blank": metrics(0.503)}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"stage": "instr')
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    retention = {"before": {"perplexity": 12.25, "texts": 30, "tokens": 500, "accuracy": 0.75, "questions": 32}}
    retention["after"] = retention["before"] | {"perplexity": 13.5, "accuracy": 0.625}
    (tmp_path / "retention.json").write_text(json.dumps(retention))
    (tmp_path / "recipe.yaml").write_text("lora: {r: 128}  # <tag> & more\n")
    return tmp_path


def read(run_dir: Path) -> tuple[str, Page]:
    html = write_report(run_dir).read_text(encoding="utf-8")
    return html, Page(html)


def test_report_is_well_formed_and_has_every_section(run_dir: Path) -> None:
    html, page = read(run_dir)
    assert set(page.ids) >= SECTIONS
    assert "left out" not in page.text
    assert html.startswith("<!doctype html>")
    assert page.tags.count("svg") == 2 * (2 + 3)  # two stages: the loss in two widths, three small charts


def test_report_needs_nothing_from_outside(run_dir: Path) -> None:
    html, page = read(run_dir)
    assert all(s.startswith(("data:image/jpeg;base64,", "#")) for s in page.sources)
    assert not re.search(r"https?://|@import|url\(", html)
    assert "link" not in page.tags
    assert "iframe" not in page.tags


def test_report_shows_the_numbers(run_dir: Path) -> None:
    _, page = read(run_dir)
    for figure in ("1.234", "0.567", "86.3", "+25.3", "50.3", "-36.0 points", "1 h 7 min", "97", "2 skipped"):
        assert figure in page.text, figure
    assert "64 without biases" in page.text
    for figure in ("9,500", "5.26 %", "700", "8,500", "8.24 %"):  # totals: language's 8,000 counts once in either stage
        assert figure in page.text, figure
    assert "frozen" in page.text
    assert "2.14.1" in page.text
    assert "<colour>" in page.text
    assert "not drawn, because not finite: 1 of 40 losses" in page.text


def test_text_of_users_is_escaped(run_dir: Path) -> None:
    html, page = read(run_dir)
    assert ALERT not in html
    assert page.text.count(ALERT) >= 2
    assert html.count("<script>") == 1
    assert "# <tag> & more" in page.text


def test_cards_say_right_or_wrong_in_words_and_a_broken_picture_has_a_placeholder(run_dir: Path) -> None:
    html, page = read(run_dir)
    assert page.text.count("✓ right") == 1
    assert page.text.count("✗ wrong") == 1
    assert page.text.count("not scored") == 1
    assert html.count('<img src="data:image/jpeg;base64,') == 1
    assert page.text.count("picture cannot be read") == 2


def test_retention_shows_what_was_lost_and_on_how_little_that_rests(run_dir: Path) -> None:
    html, page = read(run_dir)
    assert "Perplexity  500 tokens of 30 texts 12.250 13.500 ▲ +1.250" in page.text
    assert "Multiple choice, %  n = 32, 95 % interval 45.3 to 77.1 75.0 62.5 ▼ -12.5" in page.text
    assert html.count('<td class="down">▲ +1.250') == html.count('<td class="down">▼ -12.5') == 1


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("metrics.jsonl", {"training"}),
        ("evaluation.json", {"evaluation"}),
        ("retention.json", {"retention"}),
        ("samples.jsonl", {"samples"}),
        ("recipe.yaml", {"recipe"}),
        ("summary.json", {"parameters", "versions"}),
    ],
)
@pytest.mark.parametrize("content", [None, "", "{broken", "[1, 2]"])
def test_a_missing_or_broken_input_leaves_its_section_out_and_says_why(
    run_dir: Path, name: str, gone: set[str], content: str | None
) -> None:
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_text("" if name == "recipe.yaml" else content)
    _, page = read(run_dir)
    assert SECTIONS & set(page.ids) == SECTIONS - gone
    assert page.text.count("left out") == len(gone)
    assert name in page.text


def test_an_empty_run_still_gets_a_report(tmp_path: Path) -> None:
    _, page = read(tmp_path)
    assert page.text.count("left out") == len(SECTIONS)
    assert tmp_path.name in page.text


def test_no_run_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run directory"):
        write_report(tmp_path / "none")


def test_odd_values_do_not_break_the_report(run_dir: Path) -> None:
    rows = [
        {"step": 1, "loss": "high", "lrs": {"a": None}},
        {"stage": 3, "step": None, "loss": 10**400},
        {"stage": [1], "step": 2, "loss": 1},
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run_dir / "summary.json").write_text(
        '{"title": "\\ud800", "stages": [5, {"name": null, "trainable": {"part": 1}}], "data": []}'
    )
    (run_dir / "evaluation.json").write_text(
        '{"before": null, "after": {"accuracy": 1, "n": 0, "categories": []}, "blank": [[]]}'
    )
    (run_dir / "samples.jsonl").write_text(
        '{"image": null, "correct": [1]}\n{"image": "a\\u0000b", "label": {"x": "<"}}'
    )
    _, page = read(run_dir)
    assert {"evaluation", "training", "samples"} <= set(page.ids)


def test_the_same_run_gives_the_same_bytes(run_dir: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_chosen_samples_show_wrong_and_right_answers() -> None:
    samples = [{"id": i, "correct": i % 10 != 0} for i in range(500)]
    chosen = choose(samples)
    assert len(chosen) == CARDS
    assert sum(s["correct"] is False for s in chosen) == CARDS // 2
    assert [s["id"] for s in chosen] == sorted({s["id"] for s in chosen})
    assert choose(samples[:20]) == samples[:20]
    assert len(choose([{"correct": False}] * 100)) == CARDS
    assert choose([]) == []


def test_thumbnails_are_small_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying down
    Image.new("RGBA", (900, 300), (255, 0, 0, 255)).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    data = thumbnail(tmp_path / "a.jpg").removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "JPEG"
        assert image.height == 400
        assert image.width < 140
    assert thumbnail(tmp_path) == ""
    assert thumbnail(tmp_path / "none.png") == ""


def test_interval_matches_published_values() -> None:
    low, high = interval(81 / 263, 263)  # Newcombe (1998), Statistics in Medicine 17, table I: 0.2553 to 0.3662
    assert (low, high) == pytest.approx((25.53, 36.62), abs=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.24, "8.2 s"), (61, "1 min 1 s"), (4320, "1 h 12 min"), (59.96, "1 min 0 s")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
