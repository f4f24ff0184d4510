"""Files of a stage in a recipe: one, several, with weights and folders of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_data
from runs import metrics, run_train, tensors

from vlmpeft.config import load_recipe, to_yaml
from vlmpeft.data_config import DataConfig, DataFile
from vlmpeft.errors import ConfigError
from vlmpeft.preflight import check_recipe

A, B = DataFile("a.json"), DataFile("b.json", 0.5, "photos")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.json", (A,)),
        ("[a.json,c.json]", (A, DataFile("c.json"))),
        ("[{path: a.json}, {path: b.json, weight: 0.5, images: photos}]", (A, B)),
        ("[a.json, {path: b.json, weight: 5e-1, images: photos}]", (A, B)),
    ],
)
def test_files_are_given_by_the_command_line_and_by_yaml_alike(
    given: str, expected: Any, tmp_path: Path, tiny_recipe: Path
) -> None:
    recipe = load_recipe(str(tiny_recipe), [f"data.instruct={given}"])
    assert recipe.data.files("instruct") == expected
    (tmp_path / "mine.yaml").write_text(f"base: {tiny_recipe}\ndata: {{instruct: {given}}}\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).data.files("instruct") == expected
    (tmp_path / "saved.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "saved.yaml")) == recipe
    assert DataConfig().files("pretrain") == ()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("[{path: a.json, wieght: 2}]", "data.instruct: no key 'wieght'; did you mean 'weight'"),
        ("[{weight: 2}]", "data.instruct.path is not set"),
        ("[{path: a.json, weight: 0}]", "weight of a.json"),
        ("[{path: a.json, weight: much}]", "a number"),
        ("[]", "at least one file"),
        ("{path: a.json}", "a list such as [a,b]"),
    ],
)
def test_mistakes_in_the_list_are_named(given: str, says: str, tiny_recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(tiny_recipe), [f"data.instruct={given}"])
    assert says in caught.value.line()


def test_every_file_and_folder_is_looked_for_before_anything_loads(tiny_recipe: Path, data_dir: Path) -> None:
    there = data_dir / "instruct.json"
    for given, missing in (
        (f"[{there}, {data_dir}/none.json]", "none.json"),
        (f"[{{path: {there}, images: {data_dir}/none}}]", "images="),
    ):
        with pytest.raises(ConfigError, match="C110") as caught:
            check_recipe(load_recipe(str(tiny_recipe), [f"data.instruct={given}"]))
        assert missing in caught.value.message


SHORT = ("stages.pretrain=null", "stages.instruct.optim.epochs=1.25", "run.save_every=5", "run.keep=3")


def test_weighted_run_takes_the_steps_of_its_epochs_and_resumes_bitwise(tiny_recipe: Path, tmp_path: Path) -> None:
    """Files of 16 samples at weight 1.5 and of 12 at 0.5 make epochs of 24 + 6: 1.25 times ceil(30 / 4) steps."""
    other = write_data(tmp_path / "other")
    mine = f"{{path: {other['pretrain']}, weight: 0.5, images: {other['images']}}}"
    here = load_recipe(str(tiny_recipe)).data.instruct
    files = (f"data.instruct=[{{path: {here}, weight: 1.5}}, {mine}]", *SHORT)
    assert run_train(tiny_recipe, tmp_path / "straight", *files) == 0
    rows = metrics(tmp_path / "straight")
    assert [row["step"] for row in rows] == list(range(1, 11))
    copied = tmp_path / "resumed"
    assert run_train(tiny_recipe, copied, *files, f"run.resume={tmp_path}/straight/checkpoints/step-5") == 0
    assert metrics(copied) == rows[5:]
    assert tensors(copied / "final") == tensors(tmp_path / "straight" / "final")
    facts = json.loads((copied / "summary.json").read_text())["data"]
    assert (facts["records"], facts["used"]) == (28, 28)
