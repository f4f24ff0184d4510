"""The page of wrong answers: what is on it, how many are left out, nothing fetched, nothing that runs."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from eval_questions import QUESTIONS, write_pictures
from fake_bundle import FakeBundle
from PIL import Image
from test_report import Page

import vlmpeft
from vlmpeft.errors import run_command
from vlmpeft.eval import choice, pope
from vlmpeft.eval.rows import write_rows
from vlmpeft.eval.wrong_page import Wrong, write_wrong

ALERT = "<script>alert(1)</script>"
METRICS = {
    "benchmark": "pope", "parser": "official", "method": "generate", "ablate": "none", "template": None,
    "accuracy": 0.75, "accuracy_ci95": [0.5, 1.0], "n": 1200, "unparsable": 3,
}  # fmt: skip


def page_of(folder: Path, wrong: list[Wrong], shown: int = 60) -> tuple[str, Page]:
    write_wrong(folder / "wrong.html", wrong, METRICS, shown)
    html = (folder / "wrong.html").read_text(encoding="utf-8")
    return html, Page(html)


def picture(folder: Path, size: tuple[int, int] = (900, 300)) -> Path:
    Image.new("RGB", size, "green").save(folder / "p.png")
    return folder / "p.png"


def test_a_card_shows_picture_question_right_answer_text_and_parse(tmp_path: Path) -> None:
    _, page = page_of(
        tmp_path, [Wrong("7", "Is there a cow?\nLook.", "no", "Yes, a cow.", "yes", (picture(tmp_path),), "popular")]
    )
    words = " ".join(page.text.split())
    assert "popular 7 Is there a cow? Look. Right answer no Said Yes, a cow. Read as yes" in words
    (source,) = [s for s in page.sources if s]
    with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) as shown:
        assert shown.size == (400, 133)
    assert "Wrong answers: pope" in words
    assert "parser official · method generate · ablate none" in words
    assert "Accuracy, % 75.0 95 % interval 50.0 to 100.0" in words
    assert "Wrong 1 of 1,200 questions" in words
    assert "Unparsable 3 of 1,200 answers" in words
    assert "All 1 wrong answers." in words


def test_answers_beyond_the_limit_are_left_out_evenly_and_counted(tmp_path: Path) -> None:
    wrong = [Wrong(f"id-{i}", "Q?", "no", "yes") for i in range(10)]
    _, page = page_of(tmp_path, wrong, shown=4)
    assert re.findall(r"id-\d", page.text) == ["id-0", "id-2", "id-5", "id-7"]
    assert "4 of 10 wrong answers, evenly spread; 6 are left out." in page.text
    assert "No wrong answers." in page_of(tmp_path, [])[1].text


def test_pictures_are_files_or_bytes_one_or_several_or_gone(tmp_path: Path) -> None:
    path = picture(tmp_path)
    pictures = (path, path.read_bytes(), tmp_path / "gone.png", b"no picture")
    html, page = page_of(tmp_path, [Wrong("1", "Q?", "no", "", None, pictures)])
    assert html.count('<img src="data:image/jpeg;base64,') == 2
    assert html.count("picture cannot be read") == 2
    assert html.count('alt="Picture that question 1 is about"') == 2
    assert html.count('<div class="pictures">') == 1
    assert '<div class="pictures">' not in page_of(tmp_path, [Wrong("1", "Q?", "no", "", None, (path,))])[0]
    assert "Said nothing" in " ".join(page.text.split())
    assert "Read as" not in page.text


def test_nothing_of_a_question_or_an_answer_is_run_and_nothing_is_fetched(tmp_path: Path) -> None:
    html, page = page_of(tmp_path, [Wrong(ALERT, ALERT, ALERT, f"{ALERT}\ud800", ALERT, (), ALERT)])
    assert "<script" not in html
    assert ALERT in page.text
    assert not re.search(r"https?://|@import|url\(", html)
    assert page.tags.count("script") == 0


def test_a_narrow_screen_gets_one_column_as_wide_as_itself(tmp_path: Path) -> None:
    html, _ = page_of(tmp_path, [Wrong("1", "Q" * 300, "no", "y" * 300)])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr))}" in html
    assert re.search(r"\.sample p\{[^}]*overflow-wrap:anywhere", html)
    assert re.search(r"dd\{[^}]*overflow-wrap:anywhere", html)
    assert re.search(r"\.top>\*\{min-width:0;overflow-wrap:anywhere", html)  # a long subject keeps the id in sight


def test_same_input_same_bytes(tmp_path: Path) -> None:
    wrong = [Wrong("1", "Q?", "no", "yes", "yes", (picture(tmp_path),))]
    assert page_of(tmp_path, wrong)[0] == page_of(tmp_path, wrong)[0]


def test_pope_leaves_a_page_of_its_wrong_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_pictures(tmp_path / "images")
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    monkeypatch.setattr(vlmpeft, "load", lambda model, device: FakeBundle({"cat": "Yes", "hat": "no"}, "maybe"))
    given = [f"questions={tmp_path / 'q.jsonl'}", f"images={images}", f"out={tmp_path / 'out'}", "wrong=2"]
    assert run_command(pope.main, ["model=M", *given]) == 0
    page = Page((tmp_path / "out" / "wrong.html").read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    assert "2 of 3 wrong answers" in words
    assert "6 Is there a dog? Right answer no Said maybe Read as yes" in words
    assert "cat" not in words
    assert len([s for s in page.sources if s]) == 2


def test_choices_leave_a_page_with_the_right_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "images")
    row = {"image": "a.png", "options": ["red", "blue"], "answer": "A", "category": "colour"}
    rows = [{**row, "id": str(i), "question": f"Which {i}?"} for i in range(3)]
    data = tmp_path / "choice.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = FakeBundle({"Which 0": "B", "Which 1": "who knows"}, "A")
    monkeypatch.setattr(vlmpeft, "load", lambda model, device: said)
    given = [f"data={data}", f"images={tmp_path / 'images'}", f"out={tmp_path / 'out'}", "parser=mmmu"]
    assert run_command(choice.main, ["model=M", *given]) == 0
    page = Page((tmp_path / "out" / "wrong.html").read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    assert "colour 0 <image> Which 0? A. red B. blue Answer with" in words
    assert "Right answer A. red Said B Read as B" in words
    by_chance = json.loads((tmp_path / "out" / "metrics.json").read_text())["by_chance"]
    assert by_chance == 1
    assert "2 Which" not in words
