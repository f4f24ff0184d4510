"""What the probe of LMAR must not disturb, nor be disturbed by: outputs, gradients, checkpointing, steering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lmar_models import batch, llava
from tiny_models import our_inputs, our_vlm, randomise
from torch import Tensor, nn

from vlmpeft import tune
from vlmpeft.forward import checkpoint_activations
from vlmpeft.parts import parts_of
from vlmpeft.steering import MoReS, lmar
from vlmpeft.vlm import VLM


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_bit_identical_with_the_probe(training: bool) -> None:
    model, inputs = llava("sdpa"), batch("left")
    model.train(training)
    plain = model(**inputs)
    plain.loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with lmar(model) as probe:
        read = model(**inputs)
        read.loss.backward()
    assert read.logits.equal(plain.logits)
    assert all(p.grad.equal(before[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert not probe.ratio().requires_grad
    assert "forward" not in vars(parts_of(model).blocks[0])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in parts_of(model).blocks)


def test_an_encoder_of_multihead_attention_takes_its_fast_path_with_the_probe_too(language_dir: Path) -> None:
    class Tower(nn.Module):
        """(i, 3, 4, 4) -> (i, 4, 12) through torch's own encoder layer, whose fast path rounds otherwise."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.layer(pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))

    ours = our_vlm(language_dir)
    model = VLM(Tower(), ours.projector, ours.language).eval().requires_grad_(False)
    inputs = our_inputs()
    with torch.no_grad():
        plain = model(**inputs).logits
        with lmar(model):
            assert model(**inputs).logits.equal(plain)


@pytest.mark.parametrize("site", ["block_output", "block_input"])
def test_steering_the_blocks_outputs_leaves_the_first_layer_bit_identical(site: Any, language_dir: Path) -> None:
    model, inputs = our_vlm(language_dir), our_inputs()
    tuned = tune(model, [MoReS(positions="all", site=site)])
    randomise(tuned.trainable())
    found = []
    for steered in (True, False):
        with torch.no_grad(), lmar(model) as probe:
            if steered:
                model(**inputs)
            else:
                with tuned.disable():
                    model(**inputs)
        found.append(probe.ratio())
    assert bool(found[0][0] == found[1][0]) == (site == "block_output")
    assert found[0][1] != found[1][1]


def test_two_forwards_before_one_backward_with_checkpointing_are_two_forwards(language_dir: Path) -> None:
    model, inputs = our_vlm(language_dir), our_inputs()
    checkpoint_activations(model.language, True)
    model.train()
    with lmar(model) as probe:
        first = model(**inputs).loss
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).loss
        (first + other).backward()
    assert probe.per_sample().shape == (2, 2)
    singly = []
    for sign in (1, -1):
        with torch.no_grad(), lmar(model) as one:
            model(**{**inputs, "pixel_values": sign * inputs["pixel_values"]})
        singly.append(one.per_sample())
    assert probe.per_sample().equal(torch.cat(singly))
