"""MoReS inside models: locality, checkpointing, generation, padding, saving; on ours and on Hugging Face's LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_answers_alone_as_in_company
from steered import KINDS, block_outputs, logits, make
from tiny_models import IMAGE_ID, hf_inputs, hf_llava, our_inputs, our_vlm, randomise, state_of
from torch import Tensor, nn

import vlmpeft
from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, parts_of
from vlmpeft.steering import MoReS
from vlmpeft.tuners import Full, LoRA


@KINDS
@pytest.mark.parametrize("site", ["block_input", "block_output"])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_starts_as_the_untouched_model_bit_for_bit(kind: str, site: Any, rank: int, language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    before = logits(model, inputs)
    tuned = tune(model, [MoReS(rank=rank, positions="all", site=site)])
    assert logits(model, inputs).equal(before)
    randomise(tuned.trainable())
    assert not logits(model, inputs).equal(before)
    with tuned.disable():
        assert logits(model, inputs).equal(before)
    tuned.remove()
    assert logits(model, inputs).equal(before)
    assert not any("steering" in name for name, _ in model.named_modules())
    assert "forward" not in vars(parts_of(model).blocks[0])


@KINDS
def test_only_steered_positions_of_a_blocks_output_change(kind: str, language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    before = block_outputs(model, inputs)
    tuned = tune(model, [MoReS(positions="first_last:1,1", site="block_output")])
    randomise(tuned.trainable())
    after = block_outputs(model, inputs)  # the hook of a module runs behind its forward, steering included
    changed = (after[0] != before[0]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [1, 4]
    for one, other in zip(before, after, strict=True):
        assert one[0, 0].equal(other[0, 0])  # before the first steered position nothing can change


@KINDS
def test_a_block_reads_the_same_at_all_but_steered_positions(kind: str, language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    read: list[Tensor] = []
    for block in parts_of(model).blocks:  # the first thing in a block, behind the steering of its input
        norm: Any = block.input_layernorm
        norm.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    logits(model, inputs)
    randomise(tune(model, [MoReS(positions="first_last:1,1")]).trainable())
    logits(model, inputs)
    before, after = read[:2], read[2:]
    changed = [(one != other).any(-1)[0] for one, other in zip(before, after, strict=True)]
    assert changed[0].nonzero().flatten().tolist() == [1, 4]
    assert changed[1].tolist() == [False, *[True] * 7]  # the first block's attention has carried it on


@KINDS
def test_a_ratio_of_zero_leaves_the_model_bit_for_bit(kind: str, language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    before = logits(model, inputs)
    randomise(tune(model, [MoReS(positions="ratio:0", init="reference")]).trainable())
    assert logits(model, inputs).equal(before)


@KINDS
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("site", ["block_input", "block_output"])
def test_checkpointed_gradients_are_those_without_and_reach_every_unit(
    kind: str, reentrant: bool | None, site: Any, language_dir: Path
) -> None:
    gradients = []
    for checkpoint in (False, True):
        model, inputs = make(kind, language_dir)
        inputs["labels"][:, :6] = -100  # no image token predicts an answer token
        tuned = tune(model, [MoReS(rank=2, positions="all", site=site), Full("projector")])
        randomise(tuned.trainable())
        if checkpoint and reentrant is not None:
            language = model.language if kind == "ours" else model
            language.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        (model(**inputs).loss * 3).backward()
        gradients.append({name: p.grad.clone() for name, p in tuned.trainable().items() if p.grad is not None})
        assert gradients[-1].keys() == tuned.trainable().keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-6)
        if "steering" in name:
            live = gradient.abs().flatten(1).sum(1) > 0
            assert live.tolist() == [True, site == "block_input"]  # behind the last block no answer can change


def test_two_forwards_before_their_backwards_do_not_mix(language_dir: Path) -> None:
    model, inputs = make("ours", language_dir)
    other = inputs | {"input_ids": inputs["input_ids"].flip(0), "labels": inputs["labels"].flip(0)}
    tuned = tune(model, [MoReS(rank=2, positions="uniform:2")])
    randomise(tuned.trainable())
    model.language.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def gradients(*steps: Any) -> dict[str, Tensor]:
        model.zero_grad()
        for step in steps:
            step()
        return {k: p.grad.clone() for k, p in tuned.trainable().items() if p.grad is not None}

    apart = gradients(lambda: model(**inputs).loss.backward(), lambda: model(**other).loss.backward())

    def together() -> None:
        first, second = model(**inputs).loss, model(**other).loss
        first.backward()
        second.backward()

    for name, gradient in gradients(together).items():
        torch.testing.assert_close(gradient, apart[name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_gives_what_its_rows_give_alone(side: str) -> None:
    model: Any = hf_llava()
    randomise(tune(model, [MoReS(rank=2, positions="uniform:2")]).trainable())
    torch.manual_seed(1)
    pixels = torch.randn(3, 3, 8, 8)
    image = [IMAGE_ID] * 4
    rows = [([7, *image, 20], pixels[:1]), ([5, 6, 7], None), ([8, *image, 9, *image, 10, 11], pixels[1:])]
    width = max(len(ids) for ids, _ in rows)
    pad = [(width - len(ids)) for ids, _ in rows]
    ids = torch.tensor([[0] * n + r if side == "left" else r + [0] * n for n, (r, _) in zip(pad, rows, strict=True)])
    mask = torch.tensor(
        [
            [0] * n + [1] * len(r) if side == "left" else [1] * len(r) + [0] * n
            for n, (r, _) in zip(pad, rows, strict=True)
        ]
    )
    whole = logits(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    for row, (tokens, picture) in enumerate(rows):
        alone = {"input_ids": torch.tensor([tokens])} | ({} if picture is None else {"pixel_values": picture})
        expected = logits(model, alone)[0]
        torch.testing.assert_close(whole[row][mask[row].bool()], expected, rtol=1e-5, atol=1e-5)


@KINDS
def test_text_without_an_image_is_not_touched(kind: str, language_dir: Path) -> None:
    model, _ = make(kind, language_dir)
    text = {"input_ids": torch.tensor([[7, 8, 9, 10]])}
    before = logits(model, text)
    randomise(tune(model, [MoReS(positions="all", init="reference")]).trainable())
    assert logits(model, text).equal(before)


def test_cached_generation_steers_the_prompt_once_and_equals_that_without_a_cache() -> None:
    model: Any = hf_llava()
    tuned = tune(model, [MoReS(rank=2, positions="all", init="reference")])
    randomise(tuned.trainable())
    prompt = {k: v for k, v in hf_inputs().items() if k != "labels"}
    edits: list[int] = []
    units = model.model.language_model.steering.units
    steer = units.steer
    units.steer = lambda *args: edits.append(args[1]) or steer(*args)  # counts, per unit
    fixed = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(**prompt, **fixed)
    assert edits == [0, 1]
    assert model.generate(**prompt, **fixed, use_cache=False).equal(cached)
    ids = prompt["input_ids"]
    for _ in range(6):
        token = logits(model, {"input_ids": ids, "pixel_values": prompt["pixel_values"]})[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], 1)
    assert ids.equal(cached)


def test_our_generation_equals_a_full_forward_at_every_token(tiny_recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    stage = "stages.instruct.tuners.mores"
    overrides = [f"{stage}.kind=mores", f"{stage}.positions=all", f"{stage}.init=reference", f"{stage}.rank=2"]
    recipe = vlmpeft.load_recipe(str(tiny_recipe), [*overrides, "vision.image_size=64", "run.device=cpu"])
    bundle = vlmpeft.build(recipe)
    randomise(bundle.tuned.trainable())
    assert_answers_alone_as_in_company(bundle, data_dir / "images" / "000.png", tmp_path / "model")


def test_it_goes_with_lora_and_a_full_projector_and_changes_nothing_else(language_dir: Path) -> None:
    model, inputs = make("ours", language_dir)
    before = state_of(model)
    tuned = tune(model, [MoReS(positions="all"), LoRA(r=2), Full("projector")])
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = state_of(model)
    differ = {k for k in before if not now[k].equal(before[k])}
    assert differ == {k for k in before if k.startswith("projector.")}
    with pytest.raises(ModelError, match=r"M556.*steering.*cannot be merged: it edits hidden states"):
        tuned.merge()


def test_units_stay_fp32_on_a_bf16_model(language_dir: Path) -> None:
    model = our_vlm(language_dir, torch.bfloat16)
    tuned = tune(model, [MoReS(rank=2, positions="all", init="reference")])
    assert {p.dtype for p in tuned.trainable().values()} == {torch.float32}
    inputs = our_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert logits(model, inputs).dtype == torch.bfloat16
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in tuned.trainable().values())


def test_a_custom_model_is_steered_through_its_parts() -> None:
    inner: Any = hf_llava()

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = inner

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
            return self.body(input_ids=input_ids, pixel_values=pixel_values)

    model, inputs = Mine(), {k: v for k, v in hf_inputs().items() if k != "labels"}
    parts: Parts = parts_of(inner)
    before = model(**inputs).logits
    tuned = tune(model, [MoReS(positions="all", init="reference")], parts)
    assert not model(**inputs).logits.equal(before)
    with pytest.raises(ModelError, match=r"M560.*call the tuned model itself with input_ids"):
        inner.model.language_model(inputs_embeds=torch.zeros(1, 3, 32))
    tuned.remove()
    assert model(**inputs).logits.equal(before)
