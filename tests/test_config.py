"""Recipes with overrides: the grammar, the shorthands, and an answer to every mistake."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from vlmpeft.config import load_recipe
from vlmpeft.errors import ConfigError, VlmpeftError
from vlmpeft.recipe import Recipe, Stage
from vlmpeft.tuners import TUNERS, Full, LoRA


def stage_of(*overrides: str, recipe: str = "llava_lora", name: str = "instruct") -> Stage:
    return load_recipe(recipe, overrides).stages[name]


def refusal(*overrides: str, recipe: str = "llava_lora") -> str:
    with pytest.raises(VlmpeftError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


def test_overrides_reach_every_level_and_later_ones_win() -> None:
    recipe = load_recipe("llava_lora", ["optim.lr=1e-3", "run.dir=a=b", "optim.lr=1e-4", "optim.betas=[0.8,0.9]"])
    assert (recipe.stages["instruct"].optim.lr, recipe.run.dir) == (1e-4, "a=b")
    assert recipe.stages["instruct"].optim.betas == (0.8, 0.9)


def test_the_shorthand_changes_the_recipes_tuner_and_keeps_the_rest_of_it() -> None:
    lora = stage_of("lora.r=64").tuners["lora"]
    assert lora == LoRA(64, 256.0, 0.05)
    assert stage_of("tuners.lora.r=64").tuners["lora"] == lora
    assert stage_of("lora.targets=[q_proj,v_proj]").tuners["lora"].targets == ("q_proj", "v_proj")  # type: ignore[attr-defined]


@pytest.mark.parametrize("override", ["lora=null", "tuners.lora=null"])
def test_null_switches_a_tuner_off(override: str) -> None:
    assert set(stage_of(override).tuners) == {"projector"}


def test_the_shorthand_adds_a_tuner_where_there_is_none() -> None:
    stage = stage_of("lora.r=8", recipe="llava_pretrain", name="pretrain")
    assert stage.tuners == {"projector": Full(), "lora": LoRA(8)}


def test_the_shorthand_means_the_only_tuner_of_its_kind_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: llava_lora\ntuners: {lora: null, adapter: {kind: lora, r: 2, alpha: 3}}")
    tuners = stage_of("lora.r=4", recipe=str(tmp_path / "mine.yaml")).tuners
    assert tuners["adapter"] == LoRA(4, 3.0)
    assert "lora" not in tuners


def test_a_shorthand_for_several_tuners_asks_which() -> None:
    assert "[C105]" in (message := refusal("full.lr=1e-5", recipe="llava_full"))
    assert message.endswith("Fix: write tuners.language or tuners.projector.")


def test_shorthand_sections_in_a_file_sit_on_the_tuners_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: llava_lora\nlora: {r: 4}\n")
    assert stage_of(recipe=str(tmp_path / "mine.yaml")).tuners["lora"] == LoRA(4, 256.0, 0.05)
    (tmp_path / "off.yaml").write_text("base: mine.yaml\nlora: null\n")  # found beside the file that names it
    assert set(stage_of(recipe=str(tmp_path / "off.yaml")).tuners) == {"projector"}


def test_stages_are_addressed_by_name() -> None:
    recipe = load_recipe(
        "llava_two_stage",
        ["stages.instruct.tuners.lora.r=8", "stages.pretrain.optim.lr=5e-4", "stages.instruct.lora.alpha=4"],
    )
    assert recipe.stages["instruct"].tuners["lora"] == LoRA(8, 4.0, 0.05)
    assert [stage.optim.lr for stage in recipe.stages.values()] == [5e-4, 2e-4]
    assert list(load_recipe("llava_two_stage", ["stages.pretrain=null"]).stages) == ["instruct"]


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("lora.r=64", ["stages.instruct.lora.r"]),
        ("tuners.lora.r=64", ["stages.instruct.tuners.lora.r"]),
        ("tuners.projector.lr=1e-3", ["stages.pretrain.tuners.projector.lr", "stages.instruct.tuners.projector.lr"]),
        ("full.lr=1e-3", ["stages.pretrain.full.lr", "stages.instruct.full.lr"]),
        ("optim.lr=1e-3", ["stages.pretrain.optim.lr", "stages.instruct.optim.lr"]),
        ("template=plain", ["stages.pretrain.template", "stages.instruct.template"]),
        ("lora=null", ["stages.instruct.lora"]),
    ],
)
def test_keys_of_a_stage_are_refused_outside_it_with_the_stages_that_have_them(override: str, keys: list[str]) -> None:
    message = refusal(override, recipe="llava_two_stage")
    assert message.startswith("[C105]")
    assert message.endswith(f"Fix: write {' or '.join(keys)}.")
    for key in keys:  # what is proposed works
        load_recipe("llava_two_stage", [f"{key}={override.partition('=')[2]}"])


def test_aliases_name_the_parts() -> None:
    recipe = load_recipe("llava_lora", ["vision=timm:vit_x", "language=some/lm", "projector=ldpv2", "projector.grid=4"])
    assert (recipe.vision.name, recipe.language.name, recipe.projector.name) == ("timm:vit_x", "some/lm", "ldpv2")
    assert recipe.projector.options == {"grid": 4}


@pytest.mark.parametrize("order", [1, -1])
def test_another_projector_drops_the_options_of_the_old_one_but_not_those_given_with_it(
    tmp_path: Path, order: int
) -> None:
    (tmp_path / "mine.yaml").write_text("base: llava_lora\nprojector: {name: ldpv2, grid: 4}\n")
    mine = str(tmp_path / "mine.yaml")
    assert load_recipe(mine, ["projector=linear"]).projector.options == {}
    assert load_recipe(mine, ["projector=ldpv2"]).projector.options == {"grid": 4}
    back = ["projector=ldp", "optim.lr=1e-4"][::order]
    assert load_recipe(mine, back).projector.options == {}
    given = ["projector=ldpv2", "projector.grid=6"][::order]
    assert load_recipe("llava_lora", given).projector.options == {"grid": 6}


def test_another_encoder_drops_the_weights_and_colours_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "base: llava_lora\nvision: {name: 'timm:a', layer: -3, weights: f, weights_by: order, image_size: 64,"
        " compat: tinyllava_siglip, mean: [0,0,0], std: [1,1,1]}\n"
    )
    vision = load_recipe(str(tmp_path / "mine.yaml"), ["vision=timm:b"]).vision
    assert dataclasses.asdict(vision) == {
        "name": "timm:b", "layer": -3, "weights": None, "weights_by": "name", "image_size": None, "mean": None,
        "std": None, "compat": None,
    }  # fmt: skip
    kept = load_recipe(str(tmp_path / "mine.yaml"), ["vision.weights=random", "vision=timm:b"]).vision
    assert kept.weights == "random"


@pytest.mark.parametrize("value", ["007", "2024_01", "1e3", "1.50", "0x10", "1:30", "12"])
def test_folders_that_look_like_numbers_keep_their_names(value: str) -> None:
    assert load_recipe("llava_lora", [f"run.dir={value}"]).run.dir == value


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("'1e-4'", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("1", 1.0)])
def test_numbers_are_read_in_every_spelling(text: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: llava_lora\noptim: {{lr: {text}}}\n")
    assert stage_of(recipe=str(tmp_path / "mine.yaml")).optim.lr == stage_of(f"optim.lr={text}").optim.lr == value


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("optim.lr", "[C108] expected key=value, got 'optim.lr'."),
        ("--optim.lr=1", "[C108]"), ("--resume", "[C108]"), ("=1", "[C108]"), ("run..dir=x", "[C108]"),
        ("run.=x", "[C108]"),        ("optim.betas=[1,", "[C108]"), ("title=${nothing}", "[C108]"),
        ("lroa.r=3", "[C101] no section 'lroa'; did you mean 'lora'?"),
        ("lora.dropot=0.1", "[C101] tuners.lora: no key 'dropot'; did you mean 'dropout'?"),
        ("projector.dept=3", "[C104] projector 'mlp2x_gelu' has no option 'dept'"),
        ("projector=mpl2x_gelu", "[C103] no projector 'mpl2x_gelu'; did you mean 'mlp2x_gelu'?"),
        ("tuners.lora.kind=lara", "[C103] tuners.lora: no tuner 'lara'; did you mean 'lora'?"),
        ("tuners.new.r=3", "[C106] tuners.new.kind is not set."), ("vision=null", "[C106] vision.name is not set."),
        ("optim.lr=abc", "[C102] optim.lr='abc' is not a number."),
        ("lora=5", "[C102] tuners.lora=5 is not a section."),
        ("tuners=5", "[C102] tuners=5 is not a section."), ("optim=5", "[C102] optim=5 is not a section."),
        ("projector.name=[a]", "[C103]"), ("projector={a: 1}", "[C103]"),
        ("data=[1]", "[C102] data=[1] is not a section."),
        ("imports=5", "[C102] imports=5 is not a list such as [a,b]."), ("imports=torch", "[C102] imports='torch'"),
        ("imports=[no_such_module]", "[C109]"), ("title=[a]", "[C102] title="), ("init=true", "[C102] init=True"),
        ("tuners.again.kind=lora", "[M552] tuner 'again' (lora on language) meets another 'lora' there."),
        ("source=instrukt", "[C102] source='instrukt' is not one of"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_line(override: str, start: str) -> None:
    if override.startswith("tuners.again"):
        override, start = (
            "tuners.again.kind=lora",
            "[M552] tuner 'again' (lora on language) meets another 'lora' there.",
        )
    message = refusal(override)
    assert message.startswith(start)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("stages=5", "[C102] stages=5 is not a section."), ("stages.pretrain=5", "[C102] stages.pretrain=5"),
        ("stages.pretran.optim.lr=1", "[C101] no stage 'pretran'; did you mean 'pretrain'?"),
        ("stages.pretrain.optm.lr=1", "[C101] stages.pretrain: no key 'optm'; did you mean 'optim'?"),
        ("stages.pretrain.optim.lrr=1", "[C101] stages.pretrain.optim: no key 'lrr'; did you mean 'lr'?"),
        ("stages.pretrain.lora.r=8", "[M552] tuner 'lora' (lora on language) meets another 'lora' there."),
    ],
)  # fmt: skip
def test_a_mistake_in_a_stage_is_answered_before_anything_trains(override: str, start: str) -> None:
    assert refusal(override, recipe="llava_two_stage").startswith(start)


def test_a_recipe_without_a_stage_is_refused() -> None:
    message = refusal("stages.pretrain=null", "stages.instruct=null", recipe="llava_two_stage")
    assert message.startswith("[C106] the recipe has no stage left.")


def section_keys(cls: Any, prefix: str) -> list[str]:
    return [f"{prefix}{field.name}" for field in dataclasses.fields(cls)]


def schema_keys() -> list[str]:
    """Every key a single-stage recipe can set, the sections' own names included."""
    hints = {**typing.get_type_hints(Recipe), **typing.get_type_hints(Stage)}
    names = [f.name for f in (*dataclasses.fields(Recipe), *dataclasses.fields(Stage)) if f.name != "stages"]
    keys = [*names, *TUNERS]
    for name in names:
        if dataclasses.is_dataclass(hints[name]) and name != "projector":
            keys += section_keys(hints[name], f"{name}.")
    return keys + section_keys(LoRA, "lora.") + section_keys(Full, "tuners.projector.")


def test_every_key_with_one_letter_changed_is_refused_and_nearly_always_guessed(tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("{vision: {name: v}, language: {name: l}, tuners: {projector: {kind: full}}}")
    keys = schema_keys()
    assert len(keys) > 80
    guessed = total = 0
    for key in keys:
        path, _, name = key.rpartition(".")
        for position, letter in enumerate(name):
            wrong = f"{name[:position]}{'x' if letter != 'x' else 'y'}{name[position + 1 :]}"
            dotted = f"{path}.{wrong}" if path else f"{wrong}.some"
            message = refusal(f"{dotted}=1", recipe=str(small))
            assert message.startswith("[C101]"), message
            assert f"'{wrong}'" in message
            guessed += f"did you mean '{name}'?" in message
            total += 1
    assert guessed / total >= 0.95, f"{guessed} of {total}"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("optim:\n  lr: 1e-4\n  warmpu: 0.1\n", 4, "optim: no key 'warmpu'; did you mean 'warmup'?"),
        ("run:\n  seed: 3\nlora:\n  r: many\n", 5, "tuners.lora.r='many' is not an integer"),
        ("projector: {name: linear}\nlearning: {rate: 1}\n", 3, "no section 'learning'"),
        ("projector:\n  name: linear\n  depth: 3\n", 4, "projector 'linear' has no option 'depth'"),
    ],
)
def test_a_mistake_in_a_file_is_answered_with_its_line(
    text: str, line: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"base: llava_lora\n{text}")
    assert f"mine.yaml line {line}: {message}" in refusal(recipe="mine.yaml")


def test_a_mistake_in_the_file_below_is_answered_with_that_file(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("base: llava_lora\nrun: {sed: 3}\n")
    (tmp_path / "mine.yaml").write_text("base: below.yaml\nrun: {seed: 4}\n")
    assert f"{tmp_path / 'below.yaml'} line 2: run: no key 'sed'" in refusal(recipe=str(tmp_path / "mine.yaml"))


def test_a_mistake_that_was_typed_is_not_looked_for_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: llava_lora\nlora: {r: 4}\n")
    assert refusal("lora.r=x", recipe=str(tmp_path / "mine.yaml")).startswith("[C102] tuners.lora.r='x'")


def test_unknown_recipes_suggest_the_nearest_name() -> None:
    assert refusal(recipe="llava_lroa").startswith("[C103] no recipe 'llava_lroa'; did you mean 'llava_lora'?")
    assert refusal(recipe="nowhere/mine.yaml").startswith("[C103] no recipe file nowhere/mine.yaml.")


def test_the_recipes_error_class_is_that_of_the_command_line() -> None:
    with pytest.raises(ConfigError):
        load_recipe("llava_lora", ["optim.lr=2"])
