"""The shipped recipes against the published values (LLaVA's and MobileVLM's training scripts)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmpeft.config import load_recipe, recipe_names, to_yaml
from vlmpeft.recipe import Recipe, Stage

CLIP = "hf:openai/clip-vit-large-patch14-336"
VICUNA, MOBILE = "lmsys/vicuna-7b-v1.5", "mtgv/MobileLLaMA-1.4B-Chat"

# recipe, stage: language model, projector, data, template, image mode, grouping, learning rate of each tuner, batch
PRETRAIN = ("pretrain", "plain", "square", "none", 256, 32)
FINETUNE = ("instruct", "vicuna_v1", "pad", "modality", 128, 16)
PUBLISHED = {
    "llava_pretrain": (VICUNA, "mlp2x_gelu", PRETRAIN, {"projector": 1e-3}),
    "llava_full": (VICUNA, "mlp2x_gelu", FINETUNE, {"language": 2e-5, "projector": 2e-5}),
    "llava_lora": (VICUNA, "mlp2x_gelu", FINETUNE, {"lora": 2e-4, "projector": 2e-5}),
    "mobilevlm_pretrain": (MOBILE, "ldp", PRETRAIN, {"projector": 2e-3}),
    "mobilevlm_full": (MOBILE, "ldp", FINETUNE, {"language": 2e-5, "projector": 2e-5}),
    "mobilevlm_lora": (MOBILE, "ldp", FINETUNE, {"lora": 1e-4, "projector": 1e-4}),
}
COMMON = {
    "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "clip": None, "schedule": "cosine", "warmup": 0.03,
    "epochs": 1.0, "steps": None,
}  # fmt: skip


def check_stage(recipe: Recipe, stage: Stage, published: tuple[Any, ...], image_mode: bool = True) -> None:
    language, projector, (source, template, mode, group, size, micro), rates = published
    assert (recipe.vision.name, recipe.vision.layer) == (CLIP, -2)
    assert recipe.vision.mean is recipe.vision.std is recipe.vision.weights is None  # as the model declares
    assert (recipe.language.name, recipe.projector.name, recipe.projector.options) == (language, projector, {})
    assert (recipe.data.max_length, recipe.run.seed, recipe.run.precision) == (2048, 42, "bf16")
    assert recipe.align.epochs == 0  # the published recipes have no stage before the first
    assert recipe.data.image_mode == mode or not image_mode
    assert (stage.source, stage.template, stage.system, stage.turns) == (source, template, None, "chat")
    assert stage.gradient_checkpointing is True
    assert (stage.batch.size, stage.batch.micro, stage.batch.group) == (size, micro, group)
    assert {name: tuner.lr or stage.optim.lr for name, tuner in stage.tuners.items()} == rates
    assert {key: getattr(stage.optim, key) for key in COMMON} == COMMON
    for name, tuner in stage.tuners.items():
        assert (tuner.kind, tuner.part) == (("lora", "language") if name == "lora" else ("full", name))
    if "lora" in stage.tuners:
        lora: Any = stage.tuners["lora"]
        assert (lora.r, lora.numerator, lora.dropout, lora.targets, lora.rslora) == (
            128,
            256,
            0.05,
            "all-linear",
            False,
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_the_published_values(name: str) -> None:
    recipe = load_recipe(name)
    assert list(recipe.stages) == [PUBLISHED[name][2][0]]
    check_stage(recipe, next(iter(recipe.stages.values())), PUBLISHED[name])


def test_both_stages_of_llava_in_one_run_are_the_two_recipes() -> None:
    recipe = load_recipe("llava_two_stage")
    assert list(recipe.stages) == ["pretrain", "instruct"]
    check_stage(recipe, recipe.stages["pretrain"], PUBLISHED["llava_pretrain"], image_mode=False)
    check_stage(recipe, recipe.stages["instruct"], PUBLISHED["llava_lora"])
    assert recipe.stages["pretrain"] == load_recipe("llava_pretrain").stages["pretrain"]
    assert recipe.stages["instruct"] == load_recipe("llava_lora").stages["instruct"]


@pytest.mark.parametrize(
    ("name", "overrides", "rates"),
    [
        ("mobilevlm_pretrain", ["optim.lr=1e-3"], {"projector": 1e-3}),  # the released script
        ("mobilevlm_full", ["optim.lr=4e-5"], {"language": 4e-5, "projector": 4e-5}),  # 3B
        ("mobilevlm_lora", ["optim.lr=2e-4"], {"lora": 2e-4, "projector": 2e-4}),  # 3B
    ],
)
def test_the_other_published_rates_are_one_override_away(name: str, overrides: list[str], rates: dict) -> None:
    recipe = load_recipe(name, overrides)
    check_stage(recipe, next(iter(recipe.stages.values())), (*PUBLISHED[name][:3], rates))


def test_every_shipped_recipe_is_known_here() -> None:
    steered = {"llava_mores", "llava_mores_3b", "quickstart_mores"}
    assert set(recipe_names()) - {"llava_qlora"} == {
        *PUBLISHED,
        *steered,
        "llava_two_stage",
        "quickstart",
        "quickstart_scenes",
    }


@pytest.mark.parametrize(
    ("name", "language", "vision"),
    [
        ("llava_mores", VICUNA, (CLIP, -2, None)),
        ("llava_mores_3b", "microsoft/phi-2", ("hf:google/siglip-so400m-patch14-384", -2, "tinyllava_siglip")),
    ],
)
def test_steering_recipes_are_those_of_the_released_scripts(name: str, language: str, vision: tuple[Any, ...]) -> None:
    recipe = load_recipe(name)
    assert (recipe.language.name, recipe.data.image_mode) == (language, "square")
    assert (recipe.vision.name, recipe.vision.layer, recipe.vision.compat) == vision
    (stage,) = recipe.stages.values()
    assert (stage.batch.size, stage.batch.group, stage.gradient_checkpointing) == (128, "none", True)
    assert stage.tuners.keys() == {"mores", "projector"}
    steering: Any = stage.tuners["mores"]
    assert (steering.rank, steering.positions, steering.site) == (1, "first_last:4,5", "block_output")
    assert (steering.init, steering.layers, steering.lr, stage.tuners["projector"].lr) == (
        "reference",
        "all",
        2e-4,
        2e-4,
    )
    assert (stage.optim.weight_decay, stage.optim.schedule, stage.optim.warmup, stage.optim.epochs) == (
        0,
        "cosine",
        0.03,
        1,
    )


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["run.seed=7"])
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_title_and_a_folder_of_its_own(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.title
    assert recipe.run.dir == f"runs/{name}"
