"""LMAR of models with virtual tokens, which are neither image nor text but draw attention: against eager matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lmar_models import batch, from_matrices, llava
from tiny_models import IMAGE_ID, randomise
from torch import Tensor

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.parts import parts_of
from vlmpeft.steering import MoReS, lmar
from vlmpeft.steering.probe import image_attention
from vlmpeft.tuners import PrefixTuning, PromptTuning, PTuningV2

TUNERS = {  # with the virtual tokens before a layer's keys, and before its queries
    "prefix": (PrefixTuning(3, hidden=None), 3, 0),
    "projected": (PrefixTuning(3, hidden=6), 3, 0),
    "prompt": (PromptTuning(4), 4, 4),
    "ptuning": (PTuningV2(3, prompts=2), 5, 2),
}
EACH = pytest.mark.parametrize(("tuner", "keys", "queries"), TUNERS.values(), ids=TUNERS)


def tuned(attention: str, *tuners: Any) -> Any:
    """A LLaVA whose virtual tokens are strong enough to draw much of the attention."""
    model = llava(attention)
    torch.manual_seed(2)
    parameters = tune(model, list(tuners)).trainable()
    randomise(parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(5.0)
    return model


def matrices_of(model: Any, inputs: dict[str, Tensor], keys: int, queries: int) -> list[Tensor]:
    """Eager attention (b, h, s, s) of the sequence on itself: what is left for it beside the virtual tokens."""
    with torch.no_grad():
        found = model(**inputs, output_attentions=True).attentions
    assert all(w.shape[-1] == inputs["input_ids"].shape[1] + keys for w in found)
    return [w[:, :, queries:, keys:] for w in found]


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_equals_the_matrices_of_eager_attention_without_the_virtual_keys(
    tuner: Any, keys: int, queries: int, side: str
) -> None:
    inputs, streamed = batch(side), tuned("sdpa", tuner)
    with torch.no_grad(), lmar(streamed, text_scope="prompt") as probe:
        streamed(**inputs)
    matrices = matrices_of(tuned("eager", tuner), inputs, keys, queries)
    ratio, mass = from_matrices(matrices, inputs, "output")
    torch.testing.assert_close(probe.per_sample(), ratio, rtol=1e-4, atol=0)
    torch.testing.assert_close(probe.mass_per_sample(), mass, rtol=1e-4, atol=0)
    with torch.no_grad(), lmar(bare := llava("sdpa"), text_scope="prompt") as untuned:
        bare(**inputs)
    assert float((probe.mass() - untuned.mass()).abs().max()) > 0.01  # they do take attention


@EACH
def test_a_map_of_one_query_is_its_row_of_the_matrices(tuner: Any, keys: int, queries: int) -> None:
    inputs = {k: v[:1] for k, v in batch("right").items()}
    streamed = tuned("sdpa", tuner)
    found = image_attention(streamed, parts_of(streamed), 8, lambda: streamed(**inputs))
    matrices = matrices_of(tuned("eager", tuner), inputs, keys, queries)
    assert inputs["input_ids"][0, 1:5].eq(IMAGE_ID).all()
    torch.testing.assert_close(found, torch.stack([m[0, :, 8, 1:5] for m in matrices]), rtol=1e-4, atol=1e-7)


def test_a_prefix_beside_steering_is_read_too() -> None:
    inputs = batch("left")
    both = [PrefixTuning(3, hidden=None), MoReS(positions="all", init="reference")]
    streamed = tuned("sdpa", *both)
    with torch.no_grad(), lmar(streamed, text_scope="prompt") as probe:
        streamed(**inputs)
    ratio, _ = from_matrices(matrices_of(tuned("eager", *both), inputs, 3, 0), inputs, "output")
    torch.testing.assert_close(probe.per_sample(), ratio, rtol=1e-4, atol=0)


def test_a_prefix_does_not_hide_a_cache() -> None:
    model, inputs = tuned("sdpa", PrefixTuning(3, hidden=None)), batch("left")
    del inputs["labels"]
    with pytest.raises(ModelError, match=r"M564.*in a cache"), lmar(model):
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
