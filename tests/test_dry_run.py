"""`run.dry_run=true`: the published counts, from config.json files alone, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmpeft import train
from vlmpeft.build import dry_run
from vlmpeft.config import load_recipe
from vlmpeft.errors import ConfigError, ModelError

FIXTURES = Path(__file__).parent / "fixtures"
VISION = f"vision=hf:{FIXTURES / 'clip-vit-l-336'}"


def dry(recipe: str, language: str, *overrides: str) -> list[str]:
    return [f"recipe={recipe}", f"language={FIXTURES / language}", VISION, "run.dry_run=true", *overrides]


def test_the_command_prints_vicunas_counts_without_weights_or_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlmpeft.train", *dry("llava_lora", "vicuna-7b")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(train.__file__).parents[1], check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["instruct:", "trainable", "parameters"]
    assert ["projector", "20,979,712", "of", "20,979,712", "100.00%", "projector"] in rows
    assert ["language", "319,815,680", "of", "6,607,343,616", "4.84%", "lora"] in rows
    assert ["LLM", "319,815,680", "of", "6,738,415,616", "4.74%", "with", "its", "head"] in rows


@pytest.mark.parametrize(
    ("recipe", "language", "adapters", "share", "projector"),
    [
        ("llava_lora", "vicuna-13b", 500_695_040, "3.84%", 31_467_520),
        ("mobilevlm_lora", "mobilellama-1.4b", 121_110_528, "8.87%", 18_936_832),
        ("mobilevlm_lora", "mobilellama-2.7b", 200_278_016, "7.41%", 28_913_920),
    ],
)
def test_published_counts(
    recipe: str, language: str, adapters: int, share: str, projector: int, capsys: pytest.CaptureFixture
) -> None:
    assert train.main(dry(recipe, language)) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert (rows["LLM"][1], rows["LLM"][4]) == (f"{adapters:,}", share)
    assert rows["projector"][1] == rows["projector"][3] == f"{projector:,}"
    assert rows["vision"][1] == rows["lm_head"][1] == "0"
    assert rows["all"][1] == f"{adapters + projector:,}"


def test_every_stage_has_its_table() -> None:
    overrides = [f"language={FIXTURES / 'mobilellama-1.4b'}", VISION, "projector=ldpv2"]
    tables = dry_run(load_recipe("llava_two_stage", overrides))
    assert list(tables) == ["pretrain", "instruct"]
    trained = {stage: {row["part"]: row["trainable"] for row in rows} for stage, rows in tables.items()}
    assert trained["pretrain"] == {"vision": 0, "projector": 6_316_032, "language": 0, "lm_head": 0}
    assert trained["instruct"] == {"vision": 0, "projector": 6_316_032, "language": 121_110_528, "lm_head": 0}
    assert {row["part"]: row["tuners"] for row in tables["instruct"]}["language"] == ["lora"]


def test_full_tuning_trains_all_but_the_tower() -> None:
    rows = dry_run(load_recipe("llava_full", [f"language={FIXTURES / 'vicuna-7b'}", VISION]))["instruct"]
    assert {row["part"] for row in rows if row["trainable"] == row["total"]} == {"projector", "language", "lm_head"}


def test_an_encoder_of_timm_needs_no_weights_either() -> None:
    overrides = [f"language={FIXTURES / 'mobilellama-1.4b'}", "vision=timm:vit_tiny_patch16_224", "vision.layer=-1"]
    rows = dry_run(load_recipe("llava_pretrain", overrides))["pretrain"]
    assert {row["part"]: row["trainable"] for row in rows}["projector"] == 192 * 2048 + 2048**2 + 2 * 2048


@pytest.mark.parametrize(
    ("override", "code"),
    [("lora.targets=[q_prj]", "M550"), ("tuners.head={kind: lora}", "C106"), ("vision.layer=-99", "M545")],
)
def test_what_would_stop_the_run_stops_the_dry_run(override: str, code: str) -> None:
    with pytest.raises((ModelError, ConfigError)) as caught:
        train.main(dry("mobilevlm_lora", "mobilellama-1.4b", override))
    assert caught.value.code in (code, "M552")


PHI_2 = {
    "model_type": "phi", "architectures": ["PhiForCausalLM"], "vocab_size": 51200, "hidden_size": 2560,
    "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32, "partial_rotary_factor": 0.4,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip",
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    },
    "text_config": {"model_type": "siglip_text_model"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "rank", "biased", "published", "projector"),
    [
        ("phi-2", 1, 163_872, 163_840, 9_507_840),
        ("vicuna-7b", 2, 524_352, 524_288, 20_979_712),
        ("vicuna-13b", 4, 1_638_560, 1_638_400, 31_467_520),
    ],
)
def test_steering_prints_both_of_its_counts_and_the_projectors_beside_them(
    model: str, rank: int, biased: int, published: int, projector: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = dry("llava_mores", model, f"mores.rank={rank}")
    if model == "phi-2":
        for name, config in (("phi-2", PHI_2), ("siglip", SIGLIP)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        places = [f"vision.name=hf:{tmp_path / 'siglip'}", f"language={tmp_path / 'phi-2'}", f"mores.rank={rank}"]
        arguments = ["recipe=llava_mores_3b", "run.dry_run=true", *places]
    assert train.main(arguments) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["language"][1] == f"{biased:,}"
    assert rows["language"][5:] == ["mores", f"({published:,}", "without", "biases)"]
    assert rows["projector"][1] == rows["projector"][3] == f"{projector:,}"
    assert rows["all"][1] == f"{biased + projector:,}"
