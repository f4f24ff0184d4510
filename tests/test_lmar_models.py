"""LMAR of whole models against Hugging Face's own attention matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lmar_models import alphas_from_matrices, batch, from_matrices, llava
from tiny_models import IMAGE_ID, hf_llava, our_inputs, our_vlm

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, parts_of
from vlmpeft.steering import lmar
from vlmpeft.steering.probe import image_attention


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("queries", ["output", "all_text"])
def test_it_equals_the_attention_matrices_that_eager_attention_returns(
    heads: tuple[int, int], side: str, queries: Any
) -> None:
    inputs = batch(side)
    streamed, eager = llava("sdpa", *heads), llava("eager", *heads)
    with torch.no_grad(), lmar(streamed, text_scope="prompt", queries=queries) as probe:
        streamed(**inputs)
    with torch.no_grad():
        matrices = eager(**inputs, output_attentions=True).attentions
    ratio, mass = from_matrices(matrices, inputs, queries)
    assert float(ratio.log().abs().max()) > 0.3  # far from uniform, or the comparison would say little
    torch.testing.assert_close(probe.per_sample(), ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(probe.mass_per_sample(), mass, rtol=1e-5, atol=0)
    torch.testing.assert_close(probe.ratio(), ratio.mean(0), rtol=1e-5, atol=0)
    assert probe.skipped == 0


def test_samples_count_by_their_ratios_and_not_by_their_attention() -> None:
    """Eq. 2 is a mean of ratios: the ratio of means is another number where samples differ."""
    inputs, streamed, eager = batch("left"), llava("sdpa"), llava("eager")
    with torch.no_grad(), lmar(streamed, text_scope="prompt") as probe:
        streamed(**inputs)
    with torch.no_grad():
        matrices = eager(**inputs, output_attentions=True).attentions
    image, text, _ = alphas_from_matrices(matrices, inputs, "output")
    torch.testing.assert_close(probe.ratio(), (image / text).mean(0), rtol=1e-5, atol=0)
    assert ((image.mean(0) / text.mean(0)) / probe.ratio() - 1).abs().min() > 5e-3


def test_heads_by_themselves_equal_the_matrices_heads() -> None:
    inputs = {k: v[:1] for k, v in batch("right").items() if k != "pixel_values"}
    inputs["pixel_values"] = batch("right")["pixel_values"][:1]
    streamed, eager = llava("sdpa"), llava("eager")
    with torch.no_grad(), lmar(streamed, text_scope="prompt") as probe:
        streamed(**inputs)
    with torch.no_grad():
        matrices = eager(**inputs, output_attentions=True).attentions
    rows = [8, 9]  # predict the two answer tokens at 9 and 10
    expected = [m[0, :, rows, 1:5].mean((1, 2)) / m[0, :, rows][..., [0, 5, 6, 7, 8]].mean((1, 2)) for m in matrices]
    torch.testing.assert_close(probe.per_head()[0], torch.stack(expected), rtol=1e-5, atol=0)


def test_generated_answers_read_by_teacher_forcing_equal_the_attention_of_every_decoding_step() -> None:
    inputs = {k: v[:1, :9] for k, v in batch("right").items() if v.ndim == 2}
    pixels = batch("right")["pixel_values"][:1]
    eager, streamed, steps = llava("eager"), llava("sdpa"), 5
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "pixel_values": pixels}
    with torch.no_grad():
        out = eager.generate(
            **prompt, max_new_tokens=steps, do_sample=False, output_attentions=True, return_dict_in_generate=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    image, text = [1, 2, 3, 4], [0, 5, 6, 7, 8]
    alphas = [[(w[0, :, -1, image].mean(), w[0, :, -1, text].mean()) for w in step] for step in out.attentions]
    means = torch.tensor(alphas).mean(0)  # (l, 2), over the steps
    ids = out.sequences
    labels = ids.clone()
    labels[:, :9] = -100
    with torch.no_grad(), lmar(streamed, text_scope="prompt") as probe:
        streamed(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, pixel_values=pixels)
    assert len(out.attentions) == steps
    torch.testing.assert_close(probe.ratio(), means[:, 0] / means[:, 1], rtol=1e-5, atol=0)


def test_bfloat16_and_autocast_are_read_in_fp32(language_dir: Path) -> None:
    model, inputs = our_vlm(language_dir), our_inputs()
    with torch.no_grad(), lmar(model) as exact:
        model(**inputs)
    half = our_vlm(language_dir, torch.bfloat16)
    with torch.no_grad(), lmar(half) as rounded:
        half(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), lmar(model) as cast:
        model(**inputs)
    for probe in (rounded, cast):
        assert probe.per_sample().dtype == torch.float32
        torch.testing.assert_close(probe.ratio(), exact.ratio(), rtol=0.05, atol=0)
        assert not probe.ratio().equal(probe.ratio().bfloat16().float())


def test_the_map_of_one_query_equals_its_row_of_the_attention_matrices() -> None:
    full = batch("right")
    inputs = {k: v[:1] for k, v in full.items()} | {"pixel_values": full["pixel_values"][:1].double()}
    streamed, eager = llava("sdpa").double(), llava("eager").double()  # alike to the last layer, whatever the machine
    found = image_attention(streamed, parts_of(streamed), 8, lambda: streamed(**inputs))
    with torch.no_grad():
        matrices = eager(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(found, torch.stack([m[0, :, 8, 1:5] for m in matrices]).float(), rtol=1e-5, atol=1e-8)
    with pytest.raises(ModelError, match="M561"):
        image_attention(eager, parts_of(eager), 8, lambda: eager(**inputs))


def test_a_model_described_by_hand_is_read_too() -> None:
    model = hf_llava()
    found = parts_of(model)
    parts = Parts(found.vision, found.projector, found.language, found.lm_head, found.blocks[1:], IMAGE_ID)
    ids = torch.tensor([[7, *[IMAGE_ID] * 4, 20, 21]])
    with torch.no_grad(), lmar(model, parts) as probe:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8))
    assert probe.ratio().shape == (1,)  # of the blocks that are named
