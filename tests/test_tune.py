"""What trains, what does not, and how a tuned model is taken apart again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import changed, hf_inputs, hf_llava, our_inputs, our_vlm, randomise, state_of
from torch import nn

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.optim import adamw, parameter_groups, set_lr
from vlmpeft.parts import parts_of
from vlmpeft.tune import Tuned
from vlmpeft.tuners import Full, LoRA

MODELS = ("ours", "hf")
LINEARS = {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
BLOCKS = {"ours": "language.model.layers", "hf": "model.language_model.layers"}
PROJECTOR = {
    "ours": {f"projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")},
    "hf": {f"model.multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")},
}


@pytest.fixture
def make(language_dir: Path) -> Any:
    return lambda kind: (our_vlm(language_dir), our_inputs()) if kind == "ours" else (hf_llava(), hf_inputs())


def adapters(kind: str, names: list[str] | None = None) -> set[str]:
    return {
        f"{BLOCKS[kind]}.{i}.{group}.{name}.lora_{letter}.weight"
        for i in range(2) for group, members in LINEARS.items() for name in members for letter in "AB"
        if names is None or name in names
    }  # fmt: skip


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("tuners", "expected"),
    [
        ([Full()], lambda kind: PROJECTOR[kind]),
        ([LoRA(2)], adapters),
        ([LoRA(2, lr=1e-3), Full(lr=1e-4)], lambda kind: adapters(kind) | PROJECTOR[kind]),
        ([LoRA(2, targets="minimal")], lambda kind: adapters(kind, ["q_proj", "v_proj"])),
        ([LoRA(2, targets="standard")], lambda kind: adapters(kind, LINEARS["self_attn"])),
        ([LoRA(2, targets=("down_proj",))], lambda kind: adapters(kind, ["down_proj"])),
    ],
)
def test_one_step_changes_exactly_what_a_stage_trains(make: Any, kind: str, tuners: list[Any], expected: Any) -> None:
    model, inputs = make(kind)
    before = state_of(model)
    tuned = tune(model, tuners)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(tuned.trainable()) == expected(kind)
    assert not any("vision" in name for name in names)
    randomise({k: p for k, p in tuned.trainable().items() if "lora_B" in k})  # so that A has a gradient as well
    middle = state_of(model)
    optimizer = adamw(parameter_groups(tuned, 1e-2, 0.0), (0.9, 0.999), 1e-8)
    set_lr(optimizer, 1.0)
    model.train()
    model(**inputs).loss.backward()
    optimizer.step()
    assert changed(middle, model) == names
    assert changed(before, model) == names  # and applying the tuners changed no other byte


def test_full_tuning_of_the_language_model_trains_its_embeddings_norms_and_head(make: Any) -> None:
    model, _ = make("ours")
    names = set(tune(model, [Full("language"), Full("projector")]).trainable())
    assert names == {n for n, _ in model.named_parameters() if n.startswith(("language.", "projector."))}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("merged", [False, True])
def test_remove_and_disable_give_the_base_back_bit_for_bit(make: Any, kind: str, merged: bool) -> None:
    model, inputs = make(kind)
    before, base = state_of(model), logits(model, inputs)
    tuned = tune(model, [LoRA(4)])
    randomise(tuned.trainable())
    adapted = logits(model, inputs)
    if merged:
        tuned.merge()
    with tuned.disable():
        with tuned.disable():
            assert torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(model, inputs), base)
    assert torch.allclose(logits(model, inputs), adapted, atol=1e-5)
    assert not torch.allclose(adapted, base, atol=1e-3)
    tuned.remove()
    assert not changed(before, model)
    assert torch.equal(logits(model, inputs), base)
    tune(model, [LoRA(2)])  # and may be tuned again


@pytest.mark.parametrize("kind", MODELS)
def test_merge_keeps_the_outputs_and_unmerge_the_bytes(make: Any, kind: str) -> None:
    model, inputs = make(kind)
    before = state_of(model)
    tuned = tune(model, [LoRA(4)])
    randomise(tuned.trainable())
    tuned_state, unmerged = state_of(model), logits(model, inputs)
    tuned.merge()
    assert (logits(model, inputs) - unmerged).abs().max() <= 1e-5
    assert changed(tuned_state, model)
    tuned.unmerge()
    assert not changed(tuned_state, model)
    assert torch.equal(logits(model, inputs), unmerged)
    assert {k for k in changed(before, model) if "lora_" not in k} == set()


@pytest.mark.parametrize("kind", MODELS)
def test_merged_and_unloaded_it_is_a_plain_model_that_gives_the_same(make: Any, kind: str, tmp_path: Path) -> None:
    model, inputs = make(kind)
    names = set(model.state_dict())
    tuned = tune(model, [LoRA(4), Full()])
    randomise(tuned.trainable())
    adapted, base = logits(model, inputs), {k: v.clone() for k, v in tuned.plain_state().items()}
    assert set(base) == names
    tuned.merge()
    merged = {k: v.clone() for k, v in tuned.plain_state().items()}
    assert {k for k in names if not merged[k].equal(base[k])} == {
        name.replace(".lora_A.", ".") for name in adapters(kind) if "lora_A" in name
    }
    tuned.merge_and_unload()
    assert set(model.state_dict()) == names
    assert all(torch.equal(v, merged[k]) for k, v in model.state_dict().items())
    assert (logits(model, inputs) - adapted).abs().max() <= 1e-5
    assert not tuned.trainable()
    assert not any(p.requires_grad for p in model.parameters())
    assert tuned.save(tmp_path) == PROJECTOR[kind]  # what was tuned in place is still known
    tune(model, [LoRA(2)])


def test_merging_into_a_tied_weight_is_refused(make: Any) -> None:
    model, _ = make("ours")  # its head is the embedding table
    tuned = tune(model, [LoRA(2, part="lm_head")])
    before = state_of(model)
    with pytest.raises(ModelError, match="M555"):
        tuned.merge()
    assert not changed(before, model)


@pytest.mark.parametrize(("name", "guess"), [("q_prj", "q_proj"), ("lm_head", None), ("gate_prok", "gate_proj")])
def test_a_target_that_matches_nothing_is_refused_with_the_nearest_name(
    make: Any, name: str, guess: str | None
) -> None:
    model, _ = make("ours")
    before = state_of(model)
    with pytest.raises(ModelError, match="M550") as caught:
        tune(model, [LoRA(targets=("v_proj", name))])
    assert (f"did you mean '{guess}'" in str(caught.value)) is (guess is not None)
    assert not changed(before, model)


def test_a_failed_apply_leaves_the_model_as_it_was(make: Any) -> None:
    model, inputs = make("ours")
    tuned = tune(model, {"projector": Full()})
    before, base = state_of(model), logits(model, inputs)
    with pytest.raises(ModelError, match="M550"):
        tuned.apply({"lora": LoRA(2), "seeing": LoRA(2, part="vision", targets=("nothing",))})
    assert not changed(before, model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(tuned.trainable()) == PROJECTOR["ours"]
    assert torch.equal(logits(model, inputs), base)


def test_a_second_tune_of_an_adapted_model_is_refused(make: Any) -> None:
    model, _ = make("ours")
    tune(model, [LoRA(2)])
    before = state_of(model)
    with pytest.raises(ModelError, match="M552"):
        tune(model, [LoRA(4)])
    assert not changed(before, model)


@pytest.mark.parametrize(
    "later", [{"lora": LoRA(4)}, {"other": LoRA(2)}, {"lora": LoRA(2, dropout=0.1)}, {"lora": LoRA(2, alpha=1.0)}]
)
def test_a_later_stage_cannot_silently_change_an_adapter(make: Any, later: dict[str, Any]) -> None:
    tuned = tune(make("ours")[0], {"lora": LoRA(2)})
    with pytest.raises(ModelError, match="M552"):
        tuned.apply(later)


def test_the_next_stage_goes_on_with_a_tuner_and_freezes_what_it_does_not_name(make: Any) -> None:
    model, _ = make("ours")
    tuned = tune(model, {"projector": Full(), "lora": LoRA(2)})
    randomise(tuned.trainable())
    before = state_of(model)
    tuned.apply({"lora": LoRA(2, alpha=4.0, lr=1e-4)})  # alpha is what None stood for
    assert not changed(before, model)
    assert set(tuned.trainable()) == adapters("ours")
    assert tuned.tuned_names() == adapters("ours") | PROJECTOR["ours"]
    assert tuned.applied["lora"].tuner.lr == 1e-4


@pytest.mark.parametrize("order", [("language", "lora"), ("lora", "language")])
def test_full_tuning_and_lora_on_one_part_know_each_other(make: Any, order: tuple[str, str], tmp_path: Path) -> None:
    model, _ = make("ours")
    tuners = {"language": Full("language"), "lora": LoRA(2)}
    tuned = tune(model, {name: tuners[name] for name in order})
    named = {n for n, p in model.named_parameters() if p.requires_grad}
    assert named == set(tuned.trainable()) == tuned.save(tmp_path)
    assert all(row["tuners"] != ["?"] for row in tuned.table())


@pytest.mark.parametrize("tie", [False, True])
def test_of_nested_parts_the_innermost_keeps_its_tensors(tie: bool) -> None:
    model = hf_llava(tie)
    parts = parts_of(model)
    tuned = tune(model, {"language": Full("language", lr=1e-3), "head": Full("lm_head", lr=1e-4)}, parts)
    claims = tuned.claims()
    assert {id(p) for c in claims.values() for p in c.values()} == {id(p) for p in tuned.trainable().values()}
    assert sum(len(c) for c in claims.values()) == len(tuned.trainable())
    assert bool(claims["head"]) is not tie


def test_two_tuners_of_one_part_are_refused(make: Any) -> None:
    with pytest.raises(ModelError, match="M552"):
        tune(make("ours")[0], {"a": Full("projector"), "b": Full("projector")})


def test_a_fully_tuned_part_cannot_be_removed(make: Any) -> None:
    with pytest.raises(ModelError, match="M553"):
        tune(make("ours")[0], [Full()]).remove()


def test_a_projector_of_one_linear_layer_takes_no_adapter(make: Any) -> None:
    model, _ = make("ours")
    model.projector = nn.Linear(12, 32)
    with pytest.raises(ModelError, match="M551"):
        tune(model, [LoRA(2, part="projector")])
    assert type(model.projector) is nn.Linear


def test_tuners_in_a_list_are_named_after_their_part_or_kind(make: Any) -> None:
    tuned = tune(make("ours")[0], [Full(), LoRA(2), LoRA(2, part="vision")])
    assert set(tuned.applied) == {"projector", "lora", "lora_vision"}
    with pytest.raises(ModelError, match=re.escape("two tuners are called 'full_projector'")) as caught:
        tune(make("ours")[0], [Full(), Full(), Full()])
    assert caught.value.code == "M552"


def test_the_table_counts_each_tensor_once_and_the_base_without_adapters(make: Any) -> None:
    model, _ = make("ours")
    base = sum(p.numel() for p in model.parameters())
    tuned: Tuned = tune(model, [LoRA(2), Full()])
    rows = {row["part"]: row for row in tuned.table()}
    assert sum(row["total"] for row in rows.values()) == base
    assert rows["language"]["trainable"] == sum(p.numel() for n, p in tuned.trainable().items() if "lora_" in n)
    assert rows["projector"]["trainable"] == rows["projector"]["total"]
    assert rows["vision"]["trainable"] == 0
    assert (rows["language"]["tuners"], rows["vision"]["tuners"]) == (["lora"], [])
