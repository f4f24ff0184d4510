"""Which text and which queries LMAR counts, and what it says where there is nothing to count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lmar_models import batch, llava
from tiny_models import IMAGE_ID, hf_llava, our_inputs, our_vlm

from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.parts import parts_of
from vlmpeft.steering import lmar


@pytest.mark.parametrize("scope", ["instruction", "prompt", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("queries", ["output", "all_text"])
def test_a_model_whose_keys_are_zero_has_a_ratio_of_one_in_every_layer(scope: Any, side: str, queries: Any) -> None:
    model = llava("sdpa")
    with torch.no_grad():
        for block in parts_of(model).blocks:
            block.self_attn.k_proj.weight.zero_()  # type: ignore[union-attr, operator]
        with lmar(model, text_scope=scope, queries=queries) as probe:
            model(**batch(side))
    torch.testing.assert_close(probe.per_sample(), torch.ones(2, 3), rtol=1e-6, atol=0)


def test_samples_without_an_image_are_counted_and_left_out(language_dir: Path) -> None:
    model = our_vlm(language_dir)
    with torch.no_grad(), lmar(model) as probe:
        model(**our_inputs())  # the second row has no image
        model(**our_inputs())
    assert probe.per_sample().shape == (2, 2)
    assert probe.skipped == 2
    assert probe.ratio().equal(probe.per_sample()[0])


def test_without_turns_known_the_scope_of_the_instruction_is_the_prompt(language_dir: Path) -> None:
    model, found = our_vlm(language_dir), []
    for scope in ("instruction", "prompt", "all"):
        with torch.no_grad(), lmar(model, text_scope=scope) as probe:  # type: ignore[arg-type]
            model(**our_inputs())
        found.append(probe.ratio())
    assert found[0].equal(found[1])
    assert not found[1].equal(found[2])


def test_attention_over_a_cache_is_refused_and_says_how_to_read_it() -> None:
    model = hf_llava()
    ids = torch.tensor([[7, *[IMAGE_ID] * 4, 20, 21]])
    with pytest.raises(ModelError, match=r"M564.*in a cache.*prompt and answer"), lmar(model):
        model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), max_new_tokens=2, min_new_tokens=2)
    assert not parts_of(model).blocks[0]._forward_hooks
    assert model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8)).logits.isfinite().all()


@pytest.mark.parametrize("run", [True, False])
def test_attention_that_is_not_pytorchs_is_refused_when_it_is_asked_for(run: bool) -> None:
    model = llava("eager")
    with torch.no_grad(), lmar(model) as probe:
        if run:
            model(**batch("right"))
    with pytest.raises(ModelError, match=r"M561.*0 of 3 blocks.*attention=sdpa"):
        probe.ratio()


def test_forwards_without_an_image_have_no_ratio_and_that_is_said() -> None:
    model = hf_llava()
    with torch.no_grad(), lmar(model, text_scope="prompt") as probe:
        model(input_ids=torch.tensor([[7, 8, 9], [5, 6, 7]]))
    with pytest.raises(ModelError, match=r"M566.*none of 2 samples shows an image beside text of scope prompt"):
        probe.ratio()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_scope": "promt"}, r"text_scope='promt'.*did you mean 'prompt'"),
        ({"queries": "answer"}, r"queries='answer'.*known: all_text, output"),
        ({"drop_sink": -1}, "drop_sink=-1"),
    ],
)
def test_an_unknown_way_of_reading_is_named(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"C102.*{message}"):
        lmar(hf_llava(), **options)
