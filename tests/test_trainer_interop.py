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


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and every buffer, those that are not saved too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in tensors(model).items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    assert tensors(model).keys() == before.keys()
    return {k for k, v in tensors(model).items() if not torch.equal(v, before[k])}


def loop(model: Any, tuned: Any, data: list[dict[str, Tensor]], steps: int = 6) -> list[float]:
    """A training loop as anybody writes it. Returns: the losses."""
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    losses = []
    model.train()
    for step in range(steps):
        half = data[:4] if step % 2 else data[4:]
        loss = model(**{k: torch.stack([row[k] for row in half]) for k in half[0]}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_a_loop_of_ones_own_trains_what_was_declared_with_and_without_checkpointing(reentrant: bool | None) -> None:
    plain, model = hf_llava(), hf_llava()
    results = []
    for each in (plain, model):
        torch.manual_seed(0)
        tuned = vlmpeft.tune(each, [LoRA(r=8), Full("projector")])
        if each is model and reentrant is not None:
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
            each.enable_input_require_grads()
        before = snapshot(each)
        results.append(loop(each, tuned, rows(IMAGE_ID)))
        assert moved(before, each) == set(tuned.trainable())
    assert results[0][-1] < results[0][0] - 0.1
    assert results[1] == pytest.approx(results[0], abs=1e-4)


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


def test_stock_peft_continues_what_was_trained_here_and_the_other_way_round(tmp_path: Path) -> None:
    from peft import PeftModel

    batch = {k: v[None] for k, v in rows(IMAGE_ID, 1)[0].items()}
    model = hf_llava()
    tuned = vlmpeft.tune(model, [LoRA(r=8), Full("projector")])
    loop(model, tuned, rows(IMAGE_ID))
    tuned.save(tmp_path / "ours")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    base = hf_llava()
    base.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    theirs: Any = PeftModel.from_pretrained(base, tmp_path / "ours" / "adapters" / "lora").eval()
    with torch.no_grad():
        assert (theirs(**batch).logits - expected).abs().max() <= 1e-5
        for name, parameter in theirs.named_parameters():  # trained on by somebody else
            if "lora_" in name:
                parameter.add_(0.05)
        changed = theirs(**batch).logits
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = hf_llava()
    fresh.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    vlmpeft.tune(fresh, [LoRA(r=8)]).load(tmp_path / "theirs")
    with torch.no_grad():
        assert (fresh.eval()(**batch).logits - changed).abs().max() <= 1e-5


def test_trls_sft_trainer_trains_it_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = hf_llava()
    tuned = vlmpeft.tune(model, [LoRA(r=8), Full("projector")])
    before = snapshot(model)
    arguments: Any = SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
    )  # fmt: skip
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows(IMAGE_ID)])
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, data_collator=stacked
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert moved(before, model) == set(tuned.trainable())


def stacked(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {k: torch.stack([torch.as_tensor(row[k]) for row in batch]) for k in batch[0]}


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
