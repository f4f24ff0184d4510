"""MMMU's parquet files to prompts and pictures; its subjects and domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mmmu_rows import items, png, row, write_layout
from pyarrow import parquet

from vlmpeft.errors import ConfigError, EvalError
from vlmpeft.eval import mmmu
from vlmpeft.eval.choices import LETTER


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "mmmu")


DOMAINS = """
Art and Design: Art, Art_Theory, Design, Music
Business: Accounting, Economics, Finance, Manage, Marketing
Science: Biology, Chemistry, Geography, Math, Physics
Health and Medicine: Basic_Medical_Science, Clinical_Medicine, Diagnostics_and_Laboratory_Medicine, Pharmacy, Public_Health
Humanities and Social Science: History, Literature, Sociology, Psychology
Tech and Engineering: Agriculture, Architecture_and_Engineering, Computer_Science, Electronics, Energy_and_Power, Materials, Mechanical_Engineering
"""  # noqa: E501


def test_there_are_30_subjects_in_6_domains() -> None:
    lines = [line.partition(": ") for line in DOMAINS.split("\n") if line]
    assert {domain: tuple(subjects.split(", ")) for domain, _, subjects in lines} == mmmu.DOMAINS
    assert [len(subjects) for subjects in mmmu.DOMAINS.values()] == [4, 5, 5, 5, 4, 7]
    assert len({s for subjects in mmmu.DOMAINS.values() for s in subjects}) == 30


def test_subject_stands_between_the_first_and_the_last_underscore() -> None:
    assert mmmu.subject_of("validation_Diagnostics_and_Laboratory_Medicine_17") == "Diagnostics_and_Laboratory_Medicine"
    assert mmmu.subject_of("test_Art_1") == "Art"


def test_official_prompt_lists_the_options_in_brackets_and_leaves_a_blank_line(data: Path) -> None:
    found = items(data)
    assert found["Art_1"].prompt == (
        "Look: <image 1>\n(A) cat\n(B) dog\n\nAnswer with the option's letter from the given choices directly."
    )
    assert found["Math_2"].prompt == "Ratio in <image 1>?\nAnswer the question using a single word or phrase."


def test_lmms_eval_prompt_lists_the_options_with_a_stop(data: Path) -> None:
    found = items(data, prompt="lmms-eval")
    assert found["Art_1"].prompt == "Look: <image 1>\nA. cat\nB. dog\n" + LETTER
    assert found["Math_2"].prompt == "Ratio in <image 1>?\n\nAnswer the question using a single word or phrase."


def test_mode_first_shows_image_1_alone_and_keeps_the_places_in_the_text(data: Path) -> None:
    found = items(data)
    assert [len(item.images) for item in found.values()] == [1] * 6
    assert found["Math_1"].prompt.startswith("Compare <image 2> with <image 1>, then <image 2>.")


def test_mode_interleave_puts_each_image_where_it_is_named_twice_if_named_twice(data: Path) -> None:
    found = items(data, mode="interleave")
    assert found["Math_1"].prompt.startswith("Compare <image> with <image>, then <image>.\n")
    red, blue = png("red")["bytes"], png("blue")["bytes"]
    assert found["Math_1"].images == (blue, red, blue)
    assert "(A) <image>\n(B) <image>\n(C) x" in found["Math_3"].prompt
    assert found["Art_Theory_1"].images == ()  # no place names it


def test_mode_lmms_eval_shows_each_named_image_once_by_number_and_keeps_the_text(data: Path) -> None:
    found = items(data, mode="lmms-eval")
    assert found["Math_1"].images == (png("red")["bytes"], png("blue")["bytes"])
    assert found["Math_1"].prompt.startswith("Compare <image 2> with <image 1>, then <image 2>.")
    assert found["Math_3"].images == (png("red")["bytes"], png("green")["bytes"])  # named in its options
    assert len(found["Clinical_Medicine_12"].images) == 1  # <image 3> is not there
    assert found["Art_Theory_1"].images == ()


def test_no_mark_is_left_for_an_image_that_is_not_there_or_was_typed(data: Path) -> None:
    item = items(data, mode="interleave")["Clinical_Medicine_12"]
    assert item.prompt.startswith(r"<image> and <image 3> and a literal \<image>")
    assert len(item.images) == 1


def test_file_folder_split_and_its_short_name_are_found(data: Path) -> None:
    assert list(items(data, split="val")) == list(items(data))
    assert len(items(data)) == 6
    assert list(items(data, split="dev")) == ["Art_9"]
    assert list(items(data / "Art" / "dev-00000-of-00001.parquet")) == ["Art_9"]
    with pytest.raises(ConfigError, match=r"no test-\*.parquet.*choose split=dev\|validation"):
        items(data, split="test")


@pytest.mark.parametrize(("key", "value"), [("mode", "all"), ("prompt", "mine")])
def test_unknown_mode_and_prompt_are_refused(key: str, value: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}={value}: no such {key}"):
        items(data, **{key: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"options": "open('x')"}, "options must be a list"),
        ({"options": "['one']"}, "1 options"),
        ({"answer": "C"}, "its answer 'C' is none of A, B"),
        ({"id": None}, "`id` must be text"),
    ],
)
def test_row_that_is_none_of_mmmu_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EvalError, match=r"V602") as caught:
        mmmu.item_of({**row("Art_1"), **changes})
    assert says in caught.value.line()


def test_damaged_file_and_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "validation-0.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(EvalError, match=r"V602.*cannot be read"):
        items(tmp_path)
    parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "validation-0.parquet")
    with pytest.raises(EvalError, match=r"has no column question, options, answer, question_type, image_1"):
        items(tmp_path)


def test_pictures_are_needed_to_ask_and_not_to_score(tmp_path: Path) -> None:
    columns = {key: [value] for key, value in row("Art_1").items() if not key.startswith("image_")}
    parquet.write_table(pa.table(columns), tmp_path / "validation-0.parquet")
    assert list(items(tmp_path, images=False)) == ["Art_1"]
    with pytest.raises(EvalError, match=r"V602.*has no column image_1.*give MMMU's parquet files"):
        items(tmp_path)
