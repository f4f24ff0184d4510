"""What the tests of adapters share: ours and peft's layer on copies of one base, and stock peft on our folders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import changed, hf_inputs, hf_llava, logits, our_inputs, our_vlm, randomise, state_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.tune import Tuned
from vlmpeft.tuners import Tuner
from vlmpeft.tuners.base import Calibrated

D_IN, D_OUT = 24, 40


def base_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT).to(dtype).requires_grad_(False)


def peft_layer(config: PeftConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """peft's layer on a copy of the base."""
    wrapped: Any = get_peft_model(nn.Sequential(base_linear(dtype)), config)  # type: ignore[arg-type]
    layer: nn.Module = wrapped.base_model.model[0]
    return layer


def tensors_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under peft's names without the adapter's."""
    found = {k: p for k, p in layer.named_parameters() if not k.startswith("base_layer.")}
    return {k.replace(".default.weight", ".weight").replace(".default", ""): p for k, p in found.items()}


def share(ours: nn.Module, theirs: nn.Module, seed: int = 1) -> None:
    """Give both layers the same non-zero weights, in fp32."""
    mine, other = tensors_of(ours), {k: p for k, p in tensors_of(theirs).items() if p.requires_grad}
    randomise(mine, seed)
    for name, parameter in other.items():
        key = name if name in mine else name.removesuffix(".weight")
        parameter.data = mine[key].detach().clone()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 5, D_IN).to(dtype).requires_grad_(True)


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of a fixed function of it for the input and whatever trains."""
    torch.manual_seed(3)
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    trained = {k.removesuffix(".weight"): p for k, p in tensors_of(layer).items() if p.requires_grad}
    gradients = torch.autograd.grad((out.float() * weights).sum(), (x, *trained.values()))
    return {"output": out, **dict(zip(("input", *trained), gradients, strict=True))}


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """Outputs and every gradient agree, relative to the largest entry where that is above one."""
    mine, other = results(ours, x), results(theirs, x)
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype, name
        scale = max(1.0, tensor.abs().max().item())
        assert (mine[name].view(tensor.shape) - tensor).abs().max().item() <= tolerance * scale, name


def tune_calibrated(model: Any, tuner: Tuner, given: dict[str, Tensor]) -> Tuned:
    """`tune` with one tuner called "it", which has seen a sample if it must see some before it trains."""
    tuned = tune(model, {"it": tuner})
    if isinstance(tuner, Calibrated):
        tuner.calibrate(model, tuned.parts, (model(**given).loss for _ in range(1)))
    return tuned


def assert_stock_peft_agrees(tuner: Tuner, language: Path, folder: Path) -> None:
    """Stock peft loads what we save with equal logits, on the causal LM and on a Hugging Face VLM; so do we, and what
    peft saves again."""
    for model, twin, other, given in (
        (our_vlm(language), AutoModelForCausalLM.from_pretrained(language), our_vlm(language), our_inputs()),
        (hf_llava(), hf_llava(), hf_llava(), hf_inputs()),
    ):
        target = folder / type(model).__name__
        tuned = tune(model, {"it": tuner})
        randomise(tuned.trainable())
        tuned.save(target)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unexpected keyword arguments")
            theirs = PeftModel.from_pretrained(twin, target / "adapters" / "it").eval()
        assert not any(p.requires_grad for p in theirs.parameters())
        if hasattr(model, "language"):
            ids = {"input_ids": torch.arange(10, 30).view(2, 10)}
            assert (logits(theirs, ids) - logits(model, ids)).abs().max() <= 1e-5
        else:
            assert (logits(theirs, given) - logits(model, given)).abs().max() <= 1e-5
        theirs.save_pretrained(target / "theirs", save_embedding_layers=False)
        again = tune(other, {"it": tuner})
        for saved in (target, target / "theirs"):
            randomise(again.trainable(), seed=8)
            assert not logits(other, given).equal(logits(model, given))
            again.load(saved)
            assert logits(other, given).equal(logits(model, given))


def assert_lives(tuner: Tuner, language: Path, start: float = 0.0, merges: bool = True, removes: bool = True) -> None:
    """On both kinds of model: starts as the base, changes what it says it does, merges, and comes out bit for bit.

    Args:
        start: how far the logits may be off the base's before training.
        merges: whether it can be merged into either.
        removes: whether its old weights are kept; else it says where they are.
    """
    for model, given in ((our_vlm(language), our_inputs()), (hf_llava(), hf_inputs())):
        before, state = logits(model, given), state_of(model)
        tuned = tune_calibrated(model, tuner, given)
        assert (logits(model, given) - before).abs().max() <= start
        assert {n for n, p in model.named_parameters() if p.requires_grad} == tuned.trainable().keys()
        randomise(tuned.trainable())
        adapted = logits(model, given)
        assert (adapted - before).abs().max() > 1e-4
        if not removes:
            with pytest.raises(ModelError, match=r"M553.*load the base again"):
                tuned.remove()
            continue
        with tuned.disable():
            assert logits(model, given).equal(before)
        if merges:
            tuned.merge()
            assert (logits(model, given) - adapted).abs().max() <= 1e-5 * max(1.0, adapted.abs().max().item())
            tuned.unmerge()
        elif hasattr(model, "language"):
            with pytest.raises(ModelError, match=r"M55[56].*(cannot be merged: .|shares its weight)"):
                tuned.merge()
        assert logits(model, given).equal(adapted)
        tuned.remove()
        assert logits(model, given).equal(before)
        assert not changed(state, model)


def assert_checkpointing_changes_nothing(tuner: Tuner, language: Path) -> None:
    """Gradients of all that trains are those without checkpointing, in both modes; two forwards before a backward."""
    found = []
    for reentrant in (None, False, True):
        model, given = our_vlm(language), our_inputs()
        tuned = tune_calibrated(model, tuner, given)
        randomise(tuned.trainable())
        if reentrant is not None:
            model.language.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.language.enable_input_require_grads()
        model.train()
        losses = [model(**given).loss, model(**given | {"input_ids": given["input_ids"].flip(0)}).loss]
        (losses[0] * 3).backward()
        losses[1].backward()
        found.append({name: p.grad for name, p in tuned.trainable().items()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6)
            assert gradient.any(), name
