"""What steering adds to the memory of a training step: weights, gradients and moments of its own, and the steered rows.

Letters: b batch, p steered tokens of a row, d width, r rank, l layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmpeft import tune
from vlmpeft.activations import Live, storage_key
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.forward import checkpoint_activations
from vlmpeft.projectors import PROJECTORS
from vlmpeft.steering import MoReS, parameter_count
from vlmpeft.tune import Tuned
from vlmpeft.tuners import Full
from vlmpeft.vlm import VLM

D, LAYERS, FEATURES, B = 96, 3, 8, 2
FLOAT, INDEX = 4, 8  # bytes
RANKS = pytest.mark.parametrize("rank", [1, 4])
PER_WEIGHT = {1: 1.1, 4: 3.1}  # floats: U and A - U^T; r > 1: what orthonormalisation has in fp64 as well
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True])


def tuned_vlm(checkpointing: bool, *tuners: Any) -> Tuned:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    projector: Any = PROJECTORS.build("mlp2x_gelu", FEATURES, D)
    model = VLM(nn.Identity(), projector, LlamaForCausalLM(config)).train()  # type: ignore[arg-type]
    tuned = tune(model, [Full("projector"), *tuners])
    checkpoint_activations(model.language, checkpointing)
    return tuned


def batch(image: int) -> dict[str, Tensor]:
    words = torch.randint(1, 60, (B, 12), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([words[:, :1], torch.full((B, image), IMAGE_TOKEN_ID), words[:, 1:]], 1)
    labels = ids.clone()
    labels[:, :-4] = IGNORE
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.zeros(B, image, FEATURES)}


def saved(tuned: Tuned, given: dict[str, Tensor]) -> int:
    """Bytes that a forward keeps for its backward, every storage once, without weights."""
    found = {storage_key(p): 0 for p in tuned.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(storage_key(tensor), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = tuned.model(**given).loss
    total = sum(found.values())
    loss.backward()
    tuned.model.zero_grad()
    return total


def step_of(tuned: Tuned, given: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes of the weights that train, their gradients and AdamW's state; the most that a step makes beside these."""
    parameters = list(tuned.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> int:
        tuned.model(**given).loss.backward()
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        optimizer.zero_grad()
        return gradients

    gradients = step()  # the state comes with the first
    state = [value for values in optimizer.state.values() for value in values.values()]
    there = [*tuned.model.parameters(), *tuned.model.buffers(), *given.values(), *state]
    with Live(there) as live:
        step()
    return sum(p.nbytes for p in parameters) + gradients + sum(value.nbytes for value in state), live.peak


def rows(p: int, rank: int) -> int:
    """The steered rows, their r products in every layer, and where they stand."""
    return B * p * (LAYERS * (D + rank) * FLOAT + INDEX)


@RANKS
@CHECKPOINTING
def test_a_forward_keeps_the_steered_rows_and_nothing_of_the_others(rank: int, checkpointing: bool) -> None:
    kept = {
        (image, p): saved(tuned_vlm(checkpointing, MoReS(rank, f"uniform:{p}")), batch(image))
        - saved(tuned_vlm(checkpointing), batch(image))
        for image, p in ((80, 9), (160, 9), (160, 40))
    }
    assert kept[80, 9] == kept[160, 9]
    assert kept[160, 40] - kept[160, 9] == rows(40, rank) - rows(9, rank)
    assert kept[160, 9] <= rows(9, rank) + PER_WEIGHT[rank] * FLOAT * parameter_count(D, LAYERS, rank)


@RANKS
@CHECKPOINTING
def test_a_step_takes_four_floats_a_parameter_and_the_steered_rows(rank: int, checkpointing: bool) -> None:
    image, p, count = 160, 9, parameter_count(D, LAYERS, rank)
    plain = step_of(tuned_vlm(checkpointing), batch(image))
    steered = step_of(tuned_vlm(checkpointing, MoReS(rank, "first_last:4,5")), batch(image))
    own, beside = steered[0] - plain[0], steered[1] - plain[1]
    counters = 3 * FLOAT  # AdamW counts the steps of each of the three tensors
    assert own == 4 * FLOAT * count + counters
    tokens = B * (image + 12)
    assert beside <= rows(p, rank) + PER_WEIGHT[rank] * FLOAT * count + 4 * tokens  # and masks of some bytes a token
    assert beside < tokens * D * FLOAT  # less than one copy of one layer's hidden states
