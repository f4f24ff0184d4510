"""LMAR of whole models against Hugging Face's own attention matrices, and what the probe must not disturb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_ID, hf_llava, our_inputs, our_vlm, randomise
from torch import Tensor, nn

from vlmpeft import tune
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.forward import checkpoint_activations
from vlmpeft.parts import Parts, parts_of
from vlmpeft.steering import MoReS, lmar
from vlmpeft.steering.probe import image_attention
from vlmpeft.vlm import VLM

TOKENS = 4  # of one image, in both models


def llava(attention: str, heads: int = 4, key_heads: int = 2) -> Any:
    """LLaVA of transformers with large weights, so that attention is far from uniform."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=key_heads, max_position_embeddings=64, initializer_range=0.25, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def batch(side: str) -> dict[str, Tensor]:
    """Two samples of unequal length, the longer with two images, padded on one side."""
    image = [IMAGE_ID] * TOKENS
    rows = [[7, *image, 20, 21, 22, 23, 24, 25], [8, 9, *image, 30, *image, 31, 32, 33, 34]]
    answers = [2, 3]
    ids, mask, labels = (torch.zeros(2, 15, dtype=torch.long) for _ in range(3))
    labels -= 100
    for b, (row, count) in enumerate(zip(rows, answers, strict=True)):
        start = 15 - len(row) if side == "left" else 0
        ids[b, start : start + len(row)] = torch.tensor(row)
        mask[b, start : start + len(row)] = 1
        end = start + len(row)
        labels[b, end - count : end] = ids[b, end - count : end]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def from_matrices(attentions: Any, inputs: dict[str, Tensor], queries: str) -> tuple[Tensor, Tensor]:
    """Ratio (n, l) and mass (n, l) by the definition, from the matrices (b, h, s, s) that eager attention returns."""
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["labels"]
    ratio, mass = (torch.zeros(len(ids), len(attentions)) for _ in range(2))
    for layer, weights in enumerate(attentions):
        for b in range(len(ids)):
            image = {i for i in range(ids.shape[1]) if ids[b, i] == IMAGE_ID}
            real = {i for i in range(ids.shape[1]) if mask[b, i]}
            answer = {i for i in real if labels[b, i] != -100}
            asked = {i - 1 for i in answer} if queries == "output" else real - image
            alphas = []
            for q in sorted(asked):
                sees = [sorted(i for i in x if i <= q) for x in (image, real - image - answer)]
                mass[b, layer] += weights[b, :, q, sees[0]].sum(-1).mean() / len(asked)
                if all(sees):
                    alphas.append([weights[b, :, q, x].mean(-1).mean() for x in sees])
            on_image, on_text = torch.tensor(alphas).mean(0)
            ratio[b, layer] = on_image / on_text
    return ratio, mass


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
