"""Learned merges: the loss they promise to lower falls, the model is untouched, the result is an exact adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import changed, our_inputs, our_vlm, state_of
from torch import Tensor

import vlmpeft
from vlmpeft.adapter_files import Adapter, Factors
from vlmpeft.adapter_learn import learn_weights, zip_adapters
from vlmpeft.adapter_merge import MergePlan, merge
from vlmpeft.errors import ModelError
from vlmpeft.tuners import LoRA

LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")]
PENALTY = 1e-3


def adapter(seed: int, paths: list[str]) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    return Adapter({path: Factors(draw(2 + seed, 32), draw(32, 2 + seed)) for path in paths})


def pair() -> dict[str, Adapter]:
    """Two of different ranks; the second lacks a layer."""
    return {"a": adapter(0, LAYERS), "b": adapter(1, LAYERS[:-1])}


@torch.no_grad()
def with_adapter(model: Any, merged: Adapter, inputs: dict[str, Tensor]) -> Any:
    """What the model gives with an adapter's updates added to its weights."""
    weights = {path: model.language.get_submodule(path).weight for path in merged.layers}
    before = {path: weight.clone() for path, weight in weights.items()}
    for path, weight in weights.items():
        weight += merged.layers[path].delta()
    out = model(**inputs)
    for path, weight in weights.items():
        weight.copy_(before[path])
    return out


@pytest.mark.parametrize(("scope", "count"), [("layer", 4), ("global", 1)])
def test_weights_are_learned_from_the_loss_alone(scope: Any, count: int, language_dir: Path) -> None:
    model, inputs, adapters = our_vlm(language_dir), our_inputs(), pair()
    before = state_of(model)
    true = merge(adapters, MergePlan((0.9, -0.2)))
    wanted = with_adapter(model, true.adapter, {k: v for k, v in inputs.items() if k != "labels"})
    inputs["labels"][:, 1:] = wanted.logits.argmax(-1)[:, :-1]  # so that these weights are good ones
    found = learn_weights(model, adapters, [inputs], scope=scope, steps=40, lr=0.05)
    assert not changed(before, model)
    assert len({id(c) for c in found.coefficients.values()}) == 4
    assert len({tuple(c.flatten().tolist()) for c in found.coefficients.values()}) == count
    assert found.losses[-1] < 0.9 * found.losses[0]
    assert all(weights[0] > weights[1] for path, weights in found.coefficients.items() if path != LAYERS[-1])
    even = merge(adapters, MergePlan((0.5, 0.5))).adapter
    assert with_adapter(model, even, inputs).loss.item() == pytest.approx(found.losses[0], abs=1e-5)
    learned = with_adapter(model, found.adapter, inputs).loss.item()
    assert learned <= found.losses[-1] + 1e-3
    for path, weights in found.coefficients.items():
        here = [i for i, one in enumerate(adapters.values()) if path in one.layers]
        delta = sum(weights[i, 0] * list(adapters.values())[i].layers[path].delta() for i in here)
        torch.testing.assert_close(found.adapter.layers[path].delta(), delta)


def test_zip_keeps_both_outputs_and_parts_the_columns(language_dir: Path) -> None:
    model, adapters = our_vlm(language_dir), pair()
    before = state_of(model)
    first = {k: v for k, v in our_inputs().items() if k != "labels"}
    batches = {"a": first, "b": first | {"input_ids": first["input_ids"].flip(0)}}
    found = zip_adapters(model, adapters, {k: [v] for k, v in batches.items()}, steps=30, lr=0.02, penalty=PENALTY)
    assert not changed(before, model)

    def change(merged: Adapter, name: str) -> float:
        """Mean squared difference of the logits from those of one adapter, on its samples."""
        alone, both = (with_adapter(model, one, batches[name]) for one in (adapters[name], merged))
        return torch.nn.functional.mse_loss(both.logits, alone.logits).item()

    plain = merge(adapters, MergePlan((1.0, 1.0))).adapter
    start = sum(change(plain, name) for name in adapters) + PENALTY * 3 * 32  # m1 . m2 is d_in where both have a layer
    assert found.losses[0] == pytest.approx(start, rel=1e-4)
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert sum(change(found.adapter, name) for name in adapters) < sum(change(plain, name) for name in adapters)
    overlap = [(m[0] @ m[1]).abs().item() for path, m in found.coefficients.items() if path != LAYERS[-1]]
    assert max(overlap) < 32
    for path, m in found.coefficients.items():
        delta = sum(one.layers[path].delta() * m[i] for i, one in enumerate(adapters.values()) if path in one.layers)
        torch.testing.assert_close(found.adapter.layers[path].delta(), delta)


def test_what_does_not_fit_is_refused(language_dir: Path) -> None:
    model, inputs, adapters = our_vlm(language_dir), our_inputs(), pair()
    before = state_of(model)
    with pytest.raises(ModelError, match=r"M580.*no linear layer of shape"):
        learn_weights(model, {"a": adapter(0, ["model.layers.9.self_attn.q_proj"])}, [inputs])
    with pytest.raises(ModelError, match=r"M580.*no linear layer of shape"):
        learn_weights(model, {"a": Adapter({LAYERS[0]: Factors(torch.ones(1, 5), torch.ones(32, 1))})}, [inputs])
    with pytest.raises(ModelError, match=r"M580.*3 adapters"):
        zip_adapters(model, {**adapters, "c": adapters["a"]}, {})
    assert not changed(before, model)
    tuned = vlmpeft.tune(model, [LoRA(2)])
    with pytest.raises(ModelError, match=r"M580.*has an adapter that acts"):
        learn_weights(model, adapters, [inputs])
    with tuned.disable():
        assert len(learn_weights(model, adapters, [inputs], steps=2).losses) == 2
