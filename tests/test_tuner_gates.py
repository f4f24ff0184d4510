"""At tokens that `where` does not name a module gives its base's bits: recomputed, padded on the left, over a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_ID, TOKENS, make, randomise
from torch import Tensor
from tuner_table import GATED

from vlmpeft import tune
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.forward import checkpoint_activations
from vlmpeft.parts import parts_of
from vlmpeft.steering import MoReS
from vlmpeft.tuners import LoRA
from vlmpeft.tuners.attachment import Attachment

EACH = pytest.mark.parametrize("method", GATED)
WHERE = pytest.mark.parametrize("where", ["visual", "text", "answer"])
PADDING = 2


def gated_model(method: str, where: str, kind: str, language_dir: Path) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """A model under a method with values far from its start, a padded batch, and what its modules change as it runs.

    Of every call of a module: (b, s), whether its output is not the base's, bit for bit.
    """
    model, _ = make(kind, language_dir)
    tuner: Any = dataclasses.replace(GATED[method], where=where)  # type: ignore[type-var]
    randomise(tune(model, [tuner]).trainable(), scale=0.5)
    seen: list[Tensor] = []

    def compare(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        if "past_key_values" in kwargs:  # a second call of an attention must not write into the cache again
            kwargs = kwargs | {"past_key_values": None}
        with torch.no_grad():
            base = module.base_layer(*args, **kwargs)
        mine, other = (x[0] if isinstance(x, tuple) else x for x in (out, base))
        seen.append((mine != other).any(-1))

    for module in model.modules():
        if isinstance(module, Attachment):
            module.register_forward_hook(compare, with_kwargs=True)
    return model, padded_left(kind), seen


def padded_left(kind: str) -> dict[str, Tensor]:
    """Two rows with an image each, the second padded on the left."""
    image = [IMAGE_TOKEN_ID if kind == "ours" else IMAGE_ID] * TOKENS
    ids = torch.tensor([[7, 8, *image, 20, 21, 22, 23], [*[0] * PADDING, *image, 30, 31, 32, 33]])
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    labels = ids.clone()
    labels[:, :-2] = -100
    size = 4 if kind == "ours" else 8
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def chosen(given: dict[str, Tensor], where: str) -> Tensor:
    """(b, s) bool: the tokens that `where` names, by the ids themselves."""
    real = given["attention_mask"].bool()
    image = (given["input_ids"] == IMAGE_TOKEN_ID) | (given["input_ids"] == IMAGE_ID)
    return {"visual": image, "text": real & ~image, "answer": given["labels"] != -100}[where]


@pytest.mark.parametrize(("kind", "reentrant"), [("ours", False), ("hf", True)])
@WHERE
@EACH
def test_in_a_forward_and_in_what_backward_recomputes(
    method: str, where: str, kind: str, reentrant: bool, language_dir: Path
) -> None:
    model, given, seen = gated_model(method, where, kind, language_dir)
    language = model.language if kind == "ours" else model
    if reentrant:
        language.gradient_checkpointing_enable({"use_reentrant": True})
    else:
        checkpoint_activations(language, True)
    loss = model.train()(**given).loss
    once = len(seen)
    loss.backward()
    assert len(seen) == 2 * once if reentrant else once <= len(seen) <= 2 * once  # up to the last that backward needs
    expected = chosen(given, where)
    assert all(differs.equal(expected) for differs in seen)


@WHERE
@EACH
def test_in_a_prompt_and_at_every_token_generated_over_a_cache(method: str, where: str, language_dir: Path) -> None:
    model, given, seen = gated_model(method, where, "hf", language_dir)
    prompt = {key: value for key, value in given.items() if key != "labels"}
    model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    size, own = given["input_ids"].shape[1], dict[str, Callable[[], Tensor]]()
    own["visual"] = own["text"] = lambda: chosen(given, where)
    own["answer"] = lambda: torch.zeros(2, size, dtype=torch.bool)  # nothing of a prompt is an answer
    modules = sum(isinstance(m, Attachment) for m in parts_of(model).language.modules())
    assert len(seen) == 4 * modules
    for differs in seen[:modules]:
        assert differs.equal(own[where]())
    for differs in seen[modules:]:
        assert differs.equal(torch.full((2, 1), where != "visual"))  # a token it writes is text, and an answer


@pytest.mark.parametrize("cached", [True, False])
def test_a_generated_answer_is_what_a_forward_with_labels_gives(cached: bool, language_dir: Path) -> None:
    """An adapter on answers, and steering of the prompt's text: training and generation agree on which is which."""
    model, _ = make("hf", language_dir)
    tuners: list[Any] = [LoRA(4, where="answer"), MoReS(rank=2, positions="all", tokens="text", init="reference")]
    tuned = tune(model, tuners)
    randomise(tuned.trainable(), scale=0.5)
    prompt = {key: value for key, value in padded_left("hf").items() if key != "labels"}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": cached}
    out = model.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)
    size = prompt["input_ids"].shape[1]
    labels = out.sequences.clone()
    labels[:, :size] = -100
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    whole = {"input_ids": out.sequences, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        forced = model(**whole, pixel_values=prompt["pixel_values"]).logits[:, size - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), forced, rtol=1e-4, atol=1e-5)
    tuned.remove()
    assert "generate" not in vars(model)
