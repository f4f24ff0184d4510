"""Virtual tokens in models, whatever brings them: padding, turns, loss, checkpointing, caches, saving, neighbours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import assert_answers_alone_as_in_company
from tiny_models import (
    IMAGE_ID,
    TOKENS,
    changed,
    logits,
    make,
    randomise,
    state_of,
)
from torch import Tensor
from tuner_table import TABLE, VIRTUAL

import vlmpeft
from vlmpeft import tune
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.errors import ModelError
from vlmpeft.parts import parts_of
from vlmpeft.steering import MoReS
from vlmpeft.tuners import BottleneckAdapter, LoRA, PrefixTuning, PromptTuning, PTuningV2

TUNERS = {
    "prefix": PrefixTuning(3, hidden=None),
    "projected": PrefixTuning(3, hidden=6),
    "ptuning": PTuningV2(3, prompts=2),
    "prompt": PromptTuning(4),
}
EACH = pytest.mark.parametrize("tuner", TUNERS.values(), ids=TUNERS)
KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])
FIXED = {
    "max_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "suppress_tokens": [IMAGE_ID],
}


def test_no_kind_of_virtual_tokens_is_left_out() -> None:
    assert {tuner.kind for tuner in TUNERS.values()} | {"unipelt"} == {TABLE[name].kind for name in VIRTUAL}


def tuned_model(kind: str, language_dir: Path, *tuners: Any) -> tuple[Any, dict[str, Tensor], Any]:
    """A model with tuners whose parameters have values of some size, drawn from one seed."""
    torch.manual_seed(2)
    model, inputs = make(kind, language_dir)
    torch.manual_seed(2)
    tuned = tune(model, list(tuners))
    strengthen(tuned.trainable())
    return model, inputs, tuned


def strengthen(parameters: dict[str, Any]) -> None:
    """Values that change the outputs: of the order of 1 for virtual tokens."""
    randomise(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.mul_(10.0 if "tuning" in name else 1.0)


@EACH
@KINDS
def test_they_act_can_be_switched_off_and_go_without_a_trace(tuner: Any, kind: str, language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    before, state = logits(model, inputs), state_of(model)
    tuned = tune(model, [tuner])
    assert logits(model, inputs).shape == before.shape
    assert not torch.allclose(logits(model, inputs), before, atol=1e-3)
    with tuned.disable():
        assert logits(model, inputs).equal(before)
    with pytest.raises(ModelError, match="M556"):
        tuned.merge()
    tuned.remove()
    assert logits(model, inputs).equal(before)
    assert not changed(state, model)
    decoder = model.language.model if kind == "ours" else model.model.language_model
    assert "forward" not in vars(decoder)
    assert not any(block.self_attn._forward_pre_hooks for block in parts_of(model).blocks)


@EACH
@SIDES
@KINDS
def test_a_mixed_padded_batch_gives_what_its_rows_give_alone(
    tuner: Any, kind: str, side: str, language_dir: Path
) -> None:
    model, _, _ = tuned_model(kind, language_dir, tuner)
    image = [IMAGE_TOKEN_ID if kind == "ours" else IMAGE_ID] * TOKENS
    size = 4 if kind == "ours" else 8
    pixels = torch.randn(3, 3, size, size)
    rows = [([7, *image, 20], pixels[:1]), ([5, 6, 7], None), ([8, *image, 9, *image, 10, 11], pixels[1:])]
    width = max(len(ids) for ids, _ in rows)

    def padded(values: list[int]) -> list[int]:
        rest = [0] * (width - len(values))
        return rest + values if side == "left" else values + rest

    ids = torch.tensor([padded(ids) for ids, _ in rows])
    mask = torch.tensor([padded([1] * len(ids)) for ids, _ in rows])
    whole = logits(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    for row, (tokens, picture) in enumerate(rows):
        alone = {"input_ids": torch.tensor([tokens])} | ({} if picture is None else {"pixel_values": picture})
        torch.testing.assert_close(whole[row][mask[row].bool()], logits(model, alone)[0], rtol=1e-5, atol=1e-5)


@EACH
@SIDES
def test_independent_turns_are_what_each_gives_alone(tuner: Any, side: str, language_dir: Path) -> None:
    model, inputs, _ = tuned_model("ours", language_dir, tuner)
    shared, turns = inputs["input_ids"][:1, :6], ([21, 22, 23], [24, 25])
    pad = torch.zeros(1, 2, dtype=torch.long)
    row = torch.cat([shared, *(torch.tensor([t]) for t in turns)], 1)
    marks = torch.tensor([[0] * 6 + [1] * 3 + [2] * 2])
    join = (lambda x: torch.cat([pad, x], 1)) if side == "left" else (lambda x: torch.cat([x, pad], 1))
    real = join(torch.ones_like(row)).bool()
    batch = {"input_ids": join(row), "attention_mask": real, "turns": join(marks)}
    found = logits(model, batch | {"pixel_values": inputs["pixel_values"]})[real]
    for turn, at in ((0, slice(6, 9)), (1, slice(9, 11))):
        ids = torch.cat([shared, torch.tensor([turns[turn]])], 1)
        alone = logits(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})[0]
        torch.testing.assert_close(found[at], alone[6:], rtol=1e-5, atol=1e-5)


@EACH
@KINDS
def test_the_loss_is_that_of_the_answers_alone(tuner: Any, kind: str, language_dir: Path) -> None:
    model, inputs, _ = tuned_model(kind, language_dir, tuner)
    all_logits = logits(model, inputs)
    expected = F.cross_entropy(all_logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(model(**inputs).loss, expected)


@EACH
@pytest.mark.parametrize("beams", [1, 2])
def test_cached_generation_equals_that_without_a_cache(tuner: Any, beams: int, language_dir: Path) -> None:
    model, inputs, _ = tuned_model("hf", language_dir, tuner)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[0, 0, 7, *[IMAGE_ID] * 4, 30]])])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # left padding
    prompt = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8)}
    cached = model.generate(**prompt, **FIXED, num_beams=beams)
    assert model.generate(**prompt, **FIXED, num_beams=beams, use_cache=False).equal(cached)
    if beams == 1:
        for _ in range(6):
            token = logits(model, prompt)[:, -1:, :IMAGE_ID].argmax(-1)  # the last id of the vocabulary
            prompt["input_ids"] = torch.cat([prompt["input_ids"], token], 1)
            prompt["attention_mask"] = torch.cat([prompt["attention_mask"], torch.ones_like(token)], 1)
        assert prompt["input_ids"].equal(cached)


@EACH
def test_our_generation_is_the_same_alone_in_a_batch_shared_and_saved(
    tuner: Any, tiny_recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    stage = "stages.instruct.tuners"
    fields = {k: "null" if v is None else v for k, v in vars(tuner).items()} | {"kind": tuner.kind}
    overrides = [f"{stage}.lora=null", *(f"{stage}.virtual.{k}={v}" for k, v in fields.items())]
    recipe = vlmpeft.load_recipe(str(tiny_recipe), [*overrides, "vision.image_size=64", "run.device=cpu"])
    bundle = vlmpeft.build(recipe)
    strengthen({k: p for k, p in bundle.tuned.trainable().items() if "projector" not in k})
    assert_answers_alone_as_in_company(bundle, data_dir / "images" / "000.png", tmp_path / "model")


@EACH
@KINDS
def test_a_copy_of_a_model_has_its_own(tuner: Any, kind: str, language_dir: Path) -> None:
    model, inputs, tuned = tuned_model(kind, language_dir, tuner)
    before, twin = logits(model, inputs), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.zero_()
    assert logits(twin, inputs).equal(before)
    assert not logits(model, inputs).equal(before)


@EACH
def test_eager_attention_gives_what_sdpa_gives(tuner: Any, language_dir: Path) -> None:
    model, inputs, _ = tuned_model("hf", language_dir, tuner)
    expected = logits(model, inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)


@EACH
def test_hidden_states_come_out_without_them(tuner: Any, language_dir: Path) -> None:
    model, inputs, _ = tuned_model("hf", language_dir, tuner)
    out = model(**inputs, output_hidden_states=True)
    assert {h.shape[1] for h in out.hidden_states} == {inputs["input_ids"].shape[1]}


@KINDS
def test_what_depends_on_where_the_image_is_still_finds_it_behind_prompts(kind: str, language_dir: Path) -> None:
    """An adapter that acts on image tokens alone changes nothing before the first of them."""
    neighbours = [MoReS(positions="all", init="reference"), LoRA(2, where="visual", targets="minimal")]
    model, inputs, _ = tuned_model(kind, language_dir, PromptTuning(4), *neighbours)
    with_all = logits(model, inputs)
    adapters = [m for m in model.modules() if getattr(m, "base_layer", None) is not None or hasattr(m, "units")]
    for adapter in adapters:
        adapter.enabled = False
    without = logits(model, inputs)
    assert with_all[0, 0].equal(without[0, 0])  # a text token before the image
    assert (with_all[0, 1:] != without[0, 1:]).any(-1).all()


@EACH
@KINDS
def test_they_stand_beside_bottlenecks_in_either_order(tuner: Any, kind: str, language_dir: Path) -> None:
    model, inputs = make(kind, language_dir)
    before, outs = logits(model, inputs), []
    for tuners in ([BottleneckAdapter(4), tuner], [tuner, BottleneckAdapter(4)]):
        tuned = tune(model, tuners)
        with torch.no_grad():
            for _, parameter in sorted(tuned.trainable().items()):
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view(parameter.shape))
        outs.append(logits(model, inputs))
        tuned.remove()
        assert logits(model, inputs).equal(before)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


@KINDS
def test_several_kinds_stand_before_one_model_in_any_order_and_leave_in_any_order(
    kind: str, language_dir: Path
) -> None:
    model, inputs = make(kind, language_dir)
    before = logits(model, inputs)
    outs = []
    for tuners in ([PromptTuning(4), PrefixTuning(3, None)], [PrefixTuning(3, None), PromptTuning(4)]):
        tuned = tune(model, tuners)
        with torch.no_grad():
            for _, parameter in sorted(tuned.trainable().items()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        outs.append(logits(model, inputs))
        tuned.remove()
        assert logits(model, inputs).equal(before)
    torch.testing.assert_close(outs[0], outs[1])
