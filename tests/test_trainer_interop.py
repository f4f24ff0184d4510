"""Models tuned by vlmpeft.tune train under transformers.Trainer unchanged, and only what was declared moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llava import IMAGE_ID, TOKENS, hf_llava, our_llava
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import vlmpeft
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.tuners import Full, LoRA


def rows(image_id: int, count: int = 8) -> list[dict[str, Tensor]]:
    """Samples of one image, a question and an answer of four tokens."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        ids = torch.tensor([1, *[image_id] * TOKENS, 5, 6, 7 + i, 10 + i, 20 + i, 3])
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - 4, ids, IGNORE)
        pixels = torch.randn(3, 32, 32, generator=generator)
        out.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels})
    return out


def train(model: Any, data: list[dict[str, Tensor]], folder: Path, **options: Any) -> list[float]:
    """Six steps of stock Trainer. Returns: the logged losses."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=["plain", "accumulated", "checkpointed"],
)
def test_a_hugging_face_llava_trains_what_was_declared_and_nothing_else(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = hf_llava()
    tuned = vlmpeft.tune(model, [LoRA(r=8), Full("projector")])
    before = snapshot(model)
    losses = train(model, rows(IMAGE_ID), tmp_path, **options)
    assert losses[-1] < losses[0] - 0.1
    assert moved(before, model) == set(tuned.trainable())
    assert {n.split(".")[1] for n in tuned.trainable()} == {"language_model", "multi_modal_projector"}
    assert all(p.requires_grad == (n in tuned.trainable()) for n, p in model.named_parameters())


def test_what_was_trained_there_is_saved_and_loads_into_a_fresh_model(tmp_path: Path) -> None:
    model = hf_llava()
    tuned = vlmpeft.tune(model, [LoRA(r=8), Full("projector")])
    train(model, rows(IMAGE_ID), tmp_path / "trainer")
    tuned.save(tmp_path / "saved")
    fresh = hf_llava()
    vlmpeft.tune(fresh, [LoRA(r=8), Full("projector")]).load(tmp_path / "saved")
    batch = {k: v[None] for k, v in rows(IMAGE_ID, 1)[0].items()}
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, fresh.eval()(**batch).logits)


def test_parts_of_finds_the_parts_of_a_hugging_face_llava() -> None:
    model = hf_llava()
    parts = vlmpeft.parts_of(model)
    assert parts.vision is model.model.vision_tower
    assert parts.projector is model.model.multi_modal_projector
    assert parts.language is model.model.language_model
    assert parts.lm_head is model.lm_head
    assert list(parts.blocks) == list(model.model.language_model.layers)
    assert parts.image_token_id == IMAGE_ID


def test_our_own_model_trains_there_as_it_is(tmp_path: Path) -> None:
    model = our_llava(hf_llava(), tmp_path / "tower")
    tuned = vlmpeft.tune(model, [LoRA(r=8), Full("projector")])
    before = snapshot(model)
    losses = train(model, rows(IMAGE_TOKEN_ID), tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1
    assert moved(before, model) == set(tuned.trainable())


def test_both_models_take_the_same_steps_there(tmp_path: Path) -> None:
    theirs = hf_llava()
    ours = our_llava(theirs, tmp_path / "tower")
    for model in (theirs, ours):
        vlmpeft.tune(model, [Full("projector")])
    found = train(ours, rows(IMAGE_TOKEN_ID), tmp_path / "ours")
    assert found == pytest.approx(train(theirs, rows(IMAGE_ID), tmp_path / "theirs"), abs=1e-3)
