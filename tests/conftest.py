"""Tiny real parts, built once a session: a byte-level BPE tokenizer, a two-block Llama, pictures and LLaVA files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the cache of converted weights and features out of the home directory."""
    os.environ["VLMPEFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)


def make_tokenizer(bos: bool = False) -> Any:
    """A byte-level BPE tokenizer with ChatML tokens; `bos` makes it put <s> in front, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    text = [f"Is there a {c} image? What is shown? A photo of a {c} square. Yes No USER: ASSISTANT:" for c in COLOURS]
    core.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=CHATML,
    )


def make_language(directory: Path, **changes: Any) -> Path:
    """A two-block Llama with random weights and the tokenizer, as a directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.1,
        **changes,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def language_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="session")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose layers fill whole blocks of a quantised one."""
    from quant_models import make_wide

    return make_wide(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    return make_tokenizer(bos=True)


def write_images(folder: Path, count: int = 12) -> list[tuple[str, str]]:
    """Flat pictures. Returns: (file name, colour)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    out = []
    for i in range(count):
        colour = names[i % len(names)]
        Image.new("RGB", (40 + 4 * (i % 3), 40), COLOURS[colour]).save(folder / f"{i:03d}.png")
        out.append((f"{i:03d}.png", colour))
    return out


def write_data(folder: Path, count: int = 12) -> dict[str, str]:
    """A small LLaVA data set of flat pictures with text-only rows. Returns: overrides of a recipe's data section."""
    rng = random.Random(0)
    pictures = write_images(folder / "images", count)
    pretrain = [
        _record(f"p{i}", name, [("<image>\nDescribe the image.", f"A {colour} square.")])
        for i, (name, colour) in enumerate(pictures)
    ]
    instruct = []
    for i, (name, colour) in enumerate(pictures):
        other = rng.choice([c for c in COLOURS if c != colour])
        turns = [
            (f"<image>\nIs there a {colour} square?", "Yes"),
            (f"Is there a {other} square?", "No"),
            ("What is shown?", f"A {colour} square"),
        ]
        instruct.append(_record(f"i{i}", name, turns))
    instruct += [_record(f"t{i}", None, [(f"What is {i} plus 1?", str(i + 1))]) for i in range(4)]
    asked = [list(COLOURS)[(i + i % 2) % 4] for i in range(len(pictures))]  # as many yes as no
    questions = [
        {"question_id": i, "image": name, "text": f"Is there a {c} square?", "label": "yes" if c == colour else "no"}
        for i, ((name, colour), c) in enumerate(zip(pictures, asked, strict=True))
    ]
    (folder / "pretrain.json").write_text(json.dumps(pretrain))
    (folder / "instruct.json").write_text(json.dumps(instruct))
    (folder / "pope.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return {
        "pretrain": str(folder / "pretrain.json"),
        "instruct": str(folder / "instruct.json"),
        "images": str(folder / "images"),
    }


def _record(uid: str, image: str | None, turns: list[tuple[str, str]]) -> dict[str, Any]:
    conversation = [{"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))]
    return {"id": uid, **({"image": image} if image else {}), "conversations": conversation}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


TINY = """
vision: {{name: "timm:test_efficientnet", weights: random, image_size: null}}
language: {{name: "{language}"}}
projector: {{name: mlp2x_gelu}}
data:
  pretrain: "{data}/pretrain.json"
  instruct: "{data}/instruct.json"
  images: "{data}/images"
  max_length: 256
  workers: 0
stages:
  pretrain:
    source: pretrain
    template: plain
    tuners: {{projector: {{kind: full, part: projector}}}}
    optim: {{lr: 1e-2, epochs: 2}}
    batch: {{size: 4, micro: 2}}
  instruct:
    source: instruct
    template: chatml
    turns: independent
    tuners: {{lora: {{kind: lora, r: 4, dropout: 0.1}}, projector: {{kind: full, part: projector, lr: 1e-3}}}}
    optim: {{lr: 1e-2, epochs: 2}}
    batch: {{size: 4, micro: 2, group: modality}}
run: {{precision: fp32, device: cpu, save_every: 2}}
"""


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, language_dir: Path, data_dir: Path) -> Path:
    """A two-stage recipe file over the tiny parts."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY.format(language=language_dir, data=data_dir))
    return path
