"""The published code's fault under activation checkpointing, made again here, and that ours does not have it.

LLaVA-Steering steers from hooks that pyvene registers for each forward and takes away before backward (see pyvene's
issue 231). Its scripts switch gradient checkpointing on, and transformers 4.39, which it pins, checkpoints the call of
a block, with the hooks it has then: in backward the blocks are computed again without steering.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_ID, hf_inputs, hf_llava, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from vlmpeft import tune
from vlmpeft.parts import parts_of
from vlmpeft.steering import MoReS
from vlmpeft.steering.units import orthonormal
from vlmpeft.tuners import Full

RANK = 2


class Unit(nn.Module):
    """h' = h + U (A h + b - U^T h) at given positions, as the published intervention computes it."""

    def __init__(self, u: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.u, self.a, self.b = (nn.Parameter(x.detach().clone()) for x in (u, a, b))

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        h = hidden[:, positions]
        edited = h + (h @ self.a.T + self.b - h @ self.u) @ self.u.T
        return hidden.index_copy(1, positions, edited)


class Checkpointed(nn.Module):
    """A block as transformers 4.39 checkpoints it: the whole call, with the hooks that the block has at the time."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(self.block.__call__, **kwargs), *args, use_reentrant=self.reentrant)


def inputs() -> dict[str, Tensor]:
    found = hf_inputs()
    found["labels"][:, :6] = -100  # no image token predicts an answer token
    return found


def bare_model() -> Any:
    model = hf_llava().requires_grad_(False).train()
    parts_of(model).projector.requires_grad_(True)
    return model


def ours(reentrant: bool | None) -> tuple[Any, Any]:
    """A model with our steering as published, at weights far from zero. Returns: model, its units."""
    model = bare_model()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(1)
    tuned = tune(model, [MoReS(rank=RANK, positions="all", site="block_output", init="reference"), Full("projector")])
    randomise({k: p for k, p in tuned.trainable().items() if "steering" in k})
    return model.train(), model.model.language_model.steering.units


def published(reentrant: bool | None) -> tuple[Any, nn.ModuleList, Callable[[], Tensor]]:
    """The same steering from hooks that live as long as a forward. Returns: model, units, forward -> loss."""
    model, (_, units) = bare_model(), ours(None)
    u, blocks = orthonormal(units.rotation), parts_of(model).blocks
    edits = nn.ModuleList(Unit(u[i], units.source[i], units.bias[i]) for i in range(len(blocks)))
    if reentrant is not None:
        model.model.language_model.layers = nn.ModuleList(Checkpointed(block, reentrant) for block in blocks)
    batch = inputs()
    positions = (batch["input_ids"][0] == IMAGE_ID).nonzero().squeeze(1)

    def hook(edit: nn.Module) -> Callable[..., Any]:
        def steer(module: nn.Module, args: Any, out: Any) -> Any:
            return (edit(out[0], positions), *out[1:]) if isinstance(out, tuple) else edit(out, positions)

        return steer

    def forward() -> Tensor:
        hooks = [block.register_forward_hook(hook(edit)) for block, edit in zip(blocks, edits, strict=True)]
        loss: Tensor = model(**batch).loss
        for handle in hooks:
            handle.remove()
        return loss

    return model, edits, forward


def attention_calls(model: nn.Module) -> list[int]:
    """A list to which every attention of a block will add the block's number."""
    calls: list[int] = []
    for number, block in enumerate(parts_of(model).blocks):
        attention: Any = block.self_attn
        attention.register_forward_pre_hook(lambda *_, n=number: calls.append(n))
    return calls


def projector_gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parts_of(model).projector.parameters() if p.grad is not None])


def test_without_checkpointing_the_published_way_and_ours_agree() -> None:
    model, edits, forward = published(None)
    loss = forward()
    loss.backward()
    mine, units = ours(None)
    own = mine(**inputs()).loss
    own.backward()
    torch.testing.assert_close(own, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(projector_gradients(mine), projector_gradients(model), rtol=1e-4, atol=1e-7)
    a, b = torch.stack([e.a.grad for e in edits]), torch.stack([e.b.grad for e in edits])  # type: ignore[misc]
    assert a[0].abs().max() > 1e-4
    torch.testing.assert_close(units.source.grad, a, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(units.bias.grad, b, rtol=1e-4, atol=1e-7)


def test_the_published_way_trains_no_steering_and_a_wrong_projector_under_reentrant_checkpointing() -> None:
    right, _, forward = published(None)
    forward().backward()
    model, edits, forward = published(True)
    loss = forward()  # nothing in it tells of the fault
    torch.testing.assert_close(loss, published(None)[2]())
    loss.backward()
    assert all(p.grad is None for p in edits.parameters())
    truth, found = projector_gradients(right), projector_gradients(model)
    assert float((found - truth).norm() / truth.norm()) > 0.01


def test_the_published_way_breaks_under_checkpointing_that_is_not_reentrant() -> None:
    _, _, forward = published(False)
    with pytest.raises(CheckpointError):
        forward().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_ours_gets_the_gradients_of_no_checkpointing_under_either(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (None, reentrant):
        model, units = ours(checkpointing)
        attended = attention_calls(model)
        model(**inputs()).loss.backward()
        assert attended == ([0, 1] if checkpointing is None else [0, 1, 1, 0])  # each block once, and again in backward
        gradients.append([projector_gradients(model), *(p.grad for p in units.parameters())])
    assert all(g.abs().max() > 1e-4 for g in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-7)
