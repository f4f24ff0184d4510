"""Encoder, projector, language model and data swapped by the command line alone: 4 x 4 x 4 runs, all asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer, write_data
from docs_folder import make_encoder, make_recipe

import vlmpeft
from vlmpeft import train
from vlmpeft.errors import run_command

ENCODERS = {
    "clip": ["vision=hf:tiny-encoder", "vision.layer=-2"],
    "siglip": ["vision=hf:tiny-siglip", "vision.layer=-1"],
    "vit": ["vision=timm:test_vit", "vision.weights=random", "vision.image_size=64"],
    "efficientnet": ["vision=timm:test_efficientnet", "vision.weights=random", "vision.image_size=64"],
}
PROJECTORS = {
    "mlp2x_gelu": [],
    "ldpv2": ["projector.grid=2"],
    "pixel_shuffle": ["projector.factor=2"],
    "resampler": ["projector.queries=3", "projector.depth=1", "projector.heads=2", "projector.dim_head=8"],
}
LANGUAGES = ("llama", "qwen2", "gpt_neox", "gemma")
DATA = ("llava.json", "messages.jsonl", "table.csv", "table.parquet")


def make_siglip(directory: Path) -> None:
    import torch
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(directory)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)


def make_family(directory: Path, family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer(bos=family == "gemma")
    tokenizer.chat_template = CHATML
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    if family == "gemma":
        options["head_dim"] = 8
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_formats(folder: Path) -> None:
    """The same questions in four shapes."""
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [r for r in json.loads((folder / "instruct.json").read_text()) if "image" in r]
    (folder / "llava.json").write_text(json.dumps(records))
    turns = [(r["image"], r["conversations"][0]["value"], r["conversations"][1]["value"]) for r in records]
    rows = [
        {"image": i, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for i, q, a in turns
    ]
    (folder / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "question", "answer"), *turns])
    columns = zip(*turns, strict=True)
    pq.write_table(pa.table(dict(zip(("image", "question", "answer"), columns, strict=True))), folder / "table.parquet")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_data(folder)
    write_formats(folder)
    make_encoder(folder / "tiny-encoder")
    make_siglip(folder / "tiny-siglip")
    for family in LANGUAGES:
        make_family(folder / family, family)
    make_recipe(folder / "tiny.yaml")
    return folder


CELLS = [(*cell, DATA[i % 4]) for i, cell in enumerate(product(ENCODERS, PROJECTORS, LANGUAGES))]


@pytest.mark.parametrize(("encoder", "projector", "language", "data"), CELLS)
def test_any_parts_train_save_load_and_answer(
    encoder: str, projector: str, language: str, data: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts)
    directory = f"runs/{encoder}-{projector}-{language}"
    argv = ["recipe=tiny.yaml", *ENCODERS[encoder], f"projector={projector}", *PROJECTORS[projector]]
    argv += [f"language={language}", f"data.instruct={data}", f"run.dir={directory}", "optim.steps=3"]
    assert run_command(train.main, argv) == 0
    rows = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    bundle = vlmpeft.load(f"{directory}/final")
    answer: Callable[..., str] = bundle.generate
    first = answer("images/000.png", "What is shown?", max_new_tokens=4)
    assert isinstance(first, str)
    assert bundle.generate_batch([("images/000.png", "What is shown?"), (None, "Yes?")], max_new_tokens=4)[0] == first
