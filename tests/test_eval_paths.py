"""Images of questions: resolved inside their folder alone, and named with the nearest where they are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from eval_questions import QUESTIONS, write_pictures

from vlmpeft.errors import ConfigError, DataError, EvalError
from vlmpeft.eval.paths import resolve_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "images")


def test_images_are_resolved_inside_the_folder(images: Path) -> None:
    root = images.resolve()
    assert resolve_images(QUESTIONS, images) == [root / n for n in ("a.png", "b.png", "sub/c.png", "a.png")]
    assert resolve_images([{"image": "sub/../a.png"}], images) == [root / "a.png"]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "sub/../../secret.png",
        "../images_of_others/x.png",
        "..",
        "..\\secret.png",
        "sub\\..\\..\\secret.png",
        "/etc/passwd",
        "//host/share/x.png",
        "\\\\host\\share\\x.png",
        "C:\\x.png",
        "C:/x.png",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "http://169.254.169.254/x.png",
        "https://example.com/x.png",
        "link.png",
        "linked/secret.png",
    ],
)
def test_name_that_leads_outside_is_refused_and_nothing_is_opened(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "linked").symlink_to(tmp_path)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(DataError) as caught:
        resolve_images([{"image": "a.png"}, {"image": name}], images)
    assert caught.value.code == "D120"


def test_absolute_name_is_refused_even_inside_the_folder(images: Path) -> None:
    with pytest.raises(DataError, match="D120"):
        resolve_images([{"image": str(images.resolve() / "a.png")}], images)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("A.PNG", "did you mean 'a.png'?"),
        ("sub/cc.png", "did you mean 'sub/c.png'?"),
        ("val/b.png", "did you mean 'b.png'?"),
        ("zzzzzz", "(3 files there)"),
        ("sub", "it is a folder"),
        ("", "no image ''"),
        ("x" * 5000, "no image"),
        ("a\0.png", "did you mean 'a.png'?"),
        ("\ud800.png", "no image"),
        ("../secret\0.png", "(3 files there)"),
        ("\ud800/a.png", "no image"),
        (".", "(3 files there)"),
    ],
)
def test_missing_image_is_named_with_the_nearest_file_of_the_folder(name: str, says: str, images: Path) -> None:
    (images.parent / "secret.png").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        resolve_images([{"image": name}], images)
    assert caught.value.code == "D103"
    assert says in caught.value.line()


def test_number_of_missing_images_is_told(images: Path) -> None:
    with pytest.raises(DataError, match=r"\(2 images are missing\)"):
        resolve_images([{"image": "x"}, {"image": "y"}, {"image": "x"}, {"image": "a.png"}], images)


def test_images_folder_and_image_names_of_a_wrong_kind_are_refused(images: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_images(QUESTIONS, images / "a.png")
    for row in ({"image": None, "question_id": 3}, {"question_id": 3}):
        with pytest.raises(EvalError, match="question 3: `image` must be text"):
            resolve_images([row], images)
