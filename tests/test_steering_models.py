"""Every kind of steering in every kind of model: ours, Hugging Face's LLaVA, a custom one, a 4-bit base, a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quant_models import NF4, dense_twin, make_wide, quantised_vlm
from steered import logits, make
from tiny_models import hf_inputs, hf_llava, our_inputs, our_vlm, randomise
from torch import Tensor, nn

from vlmpeft import tune
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.layout_names import TEMPLATES
from vlmpeft.parts import Parts, parts_of
from vlmpeft.routed import cache_name, generating
from vlmpeft.routing import Routing, routing_of
from vlmpeft.steering import MoReS, positions
from vlmpeft.steering.mores import IndexOf
from vlmpeft.template import IMAGE, Exchange, TurnEncoder
from vlmpeft.tuners import Full, LoRA

KINDS = {
    "mores": MoReS(rank=2, positions="all", init="reference"),
    "loreft": MoReS(rank=2, positions="all", tokens="text"),
    "unconstrained": MoReS(rank=2, positions="all", variant="unconstrained"),
    "random": MoReS(rank=2, positions="all", variant="random"),
}
EACH = pytest.mark.parametrize("tuner", KINDS.values(), ids=KINDS)


class Custom(nn.Module):
    """A user's own module, whose anatomy is told by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = hf_llava()

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        return self.body(input_ids=input_ids, pixel_values=pixel_values, labels=labels)


def model_of(where: str, language_dir: Path) -> tuple[Any, dict[str, Tensor], Parts]:
    if where == "custom":
        custom: Any = Custom()
        return custom, hf_inputs(), parts_of(custom.body)
    model, inputs = make(where, language_dir)
    return model, inputs, parts_of(model)


@EACH
@pytest.mark.parametrize("where", ["ours", "hf", "custom"])
def test_each_kind_steers_each_model_and_trains_beside_lora_and_the_projector(
    tuner: MoReS, where: str, language_dir: Path
) -> None:
    model, inputs, parts = model_of(where, language_dir)
    inputs["labels"][:, :6] = -100  # some of the text is the prompt's
    before = logits(model, inputs)
    tuned = tune(model, [tuner, LoRA(r=2), Full("projector")], parts)
    randomise({k: p for k, p in tuned.trainable().items() if "projector" not in k})
    steered = logits(model, inputs)
    with tuned.disable():
        assert logits(model, inputs).equal(before)
    model(**inputs).loss.backward()
    for name, parameter in tuned.trainable().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert any("steering" in name for name in tuned.trainable()) == (tuner.variant != "random")
    units: Any = parts.language.steering.units  # type: ignore[union-attr]
    with torch.no_grad():
        units.bias.add_(1.0)
    assert (logits(model, inputs) - steered).abs().max() > 1e-3  # it is the steering that acts, not LoRA alone


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wide(tmp_path_factory.mktemp("wide"))


@EACH
def test_a_four_bit_base_is_steered_as_its_dense_twin_with_units_in_fp32(tuner: MoReS, wide: Path) -> None:
    model, inputs = quantised_vlm(wide), our_inputs()
    before = logits(model, inputs)
    tuned = tune(model, [tuner, Full("projector")])
    randomise({k: p for k, p in tuned.trainable().items() if "projector" not in k})
    assert {p.dtype for p in model.language.steering.parameters()} == {torch.float32}  # type: ignore[union-attr]
    found = logits(model, inputs)
    assert not found.equal(before)
    torch.testing.assert_close(found, logits(dense_twin(model), inputs), rtol=1e-4, atol=1e-4)
    model(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tuned.trainable().values())
    assert NF4.bits == 4


@EACH
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_a_prompt_taken_in_chunks_is_steered_as_in_one(tuner: MoReS, chunk: int, language_dir: Path) -> None:
    from transformers import DynamicCache

    model, inputs = our_vlm(language_dir), {k: v[:1] for k, v in our_inputs().items() if k != "labels"}
    randomise(tune(model, [tuner]).trainable())
    mask = torch.ones_like(inputs["input_ids"]).bool()
    routing, embeddings = model.embed(inputs["input_ids"], mask, None, inputs["pixel_values"])
    cache, name, pieces = DynamicCache(), cache_name(model.language.model.forward), []  # type: ignore[arg-type]
    with torch.no_grad(), generating(model.language, routing):
        for piece in embeddings.split(chunk, 1):
            pieces.append(model.language(inputs_embeds=piece, use_cache=True, **{str(name): cache}).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("choice", ["all", "first_last:2,1", "uniform:4", "ratio:0.3", "random:0.5,3"])
def test_what_is_steered_are_image_tokens_in_every_template(template: str, choice: str, bos_tokenizer: Any) -> None:
    count = 9
    contents = (IMAGE,) if template == "plain" else (IMAGE, "\nWhat is shown? Now ", IMAGE)
    question = Exchange(contents, "A photo of a red square")
    encoding = TurnEncoder(bos_tokenizer, template, count).encode([question])
    images = len([part for part in question.question if part is IMAGE])
    ids = torch.tensor([encoding.input_ids])
    routing = routing_of(ids, torch.ones_like(ids), None, IMAGE_TOKEN_ID, (count,) * images)
    parsed = positions.parse(choice)
    found = ids.flatten()[IndexOf(parsed, "visual")(routing)]
    one = int(positions.chosen(parsed, torch.ones(1, count, dtype=torch.bool)).sum())
    assert found.tolist() == [IMAGE_TOKEN_ID] * (images * one)
    known = IndexOf(parsed, "visual")(Routing(routing.visual, routing.text))  # without the host's count
    assert ids.flatten()[known].eq(IMAGE_TOKEN_ID).all()
