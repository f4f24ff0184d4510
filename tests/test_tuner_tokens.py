"""Which tokens adapters act on, and that neighbours in a batch, padding and a cache change nothing: for every kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_ID, TOKENS, logits, make, randomise
from torch import Tensor
from tuner_table import GATED, TABLE, VIRTUAL, tuned_model

from vlmpeft import tune
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.errors import ConfigError
from vlmpeft.pool import AdapterPool
from vlmpeft.tuners import BottleneckAdapter, Full, LoRA
from vlmpeft.tuners.attachment import Attachment

# Those of virtual tokens are in test_virtual_tokens.py.
ACTING = pytest.mark.parametrize("name", [n for n in TABLE if n not in VIRTUAL or n.startswith("unipelt")])
KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])
FIXED = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [99]}


def test_every_adapter_on_activations_is_gated() -> None:
    assert set(GATED) == {"lora", "adalora", "dora", "vera", "oft", "krona", "ia3", "bottleneck"}


@KINDS
@pytest.mark.parametrize("where", ["visual", "text", "answer"])
@pytest.mark.parametrize("method", GATED)
def test_at_all_other_tokens_a_module_gives_what_its_base_gives_bit_for_bit(
    method: str, where: str, kind: str, language_dir: Path
) -> None:
    model, given = make(kind, language_dir)
    tuner: Any = dataclasses.replace(GATED[method], where=where)  # type: ignore[type-var]
    randomise(tune(model, [tuner]).trainable(), scale=0.5)
    adapted = [m for m in model.modules() if isinstance(m, Attachment)]
    seen: list[Tensor] = []

    def compare(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        base = module.base_layer(*args, **kwargs)
        mine, other = (x[0] if isinstance(x, tuple) else x for x in (out, base))
        seen.append((mine != other).any(-1))

    for module in adapted:
        module.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        model(**given)
    visual = given["input_ids"] == (IMAGE_TOKEN_ID if kind == "ours" else IMAGE_ID)
    expected = {"visual": visual, "text": ~visual, "answer": given["labels"] != -100}[where]
    assert len(seen) == len(adapted) > 0
    assert all(differs.equal(expected) for differs in seen)


@pytest.mark.parametrize("method", GATED)
def test_where_and_layers_ask_for_the_language_model(method: str) -> None:
    tuner: Any = GATED[method]
    for field, value in (("where", "visual"), ("layers", "last:1")):
        with pytest.raises(ConfigError, match=rf"C102.*{method}\.{field}.*language model"):
            dataclasses.replace(tuner, **{"part": "vision", "where": "all", field: value})
    with pytest.raises(ConfigError, match=rf"C102.*{method}\.where.*one of all, visual, text, answer"):
        dataclasses.replace(tuner, where="images")


@ACTING
def test_a_mixed_batch_padded_on_either_side_gives_what_its_rows_give_alone(name: str, language_dir: Path) -> None:
    model, _, _ = tuned_model(name, "ours", language_dir)
    image, pixels = [IMAGE_TOKEN_ID] * TOKENS, torch.randn(3, 3, 4, 4)
    rows = [([7, *image, 20], pixels[:1]), ([5, 6, 7], None), ([8, *image, 9, *image, 10, 11], pixels[1:])]
    width = max(len(ids) for ids, _ in rows)
    alone = [logits(model, one_row(ids, shown))[0] for ids, shown in rows]
    for side in ("left", "right"):

        def padded(values: list[int], side: str = side) -> list[int]:
            rest = [0] * (width - len(values))
            return rest + values if side == "left" else values + rest

        ids = torch.tensor([padded(ids) for ids, _ in rows])
        mask = torch.tensor([padded([1] * len(ids)) for ids, _ in rows])
        whole = logits(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
        for row, expected in enumerate(alone):
            torch.testing.assert_close(whole[row][mask[row].bool()], expected, rtol=1e-4, atol=1e-5)


def one_row(ids: list[int], pixels: Tensor | None) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([ids])} | ({} if pixels is None else {"pixel_values": pixels})


@ACTING
def test_generation_with_a_cache_is_that_without(name: str, language_dir: Path) -> None:
    model, given, _ = tuned_model(name, "hf", language_dir)
    prompt = {key: value for key, value in given.items() if key != "labels"}
    cached = model.generate(**prompt, **FIXED)
    assert model.generate(**prompt, **FIXED, use_cache=False).equal(cached)


OTHERS = {"bottleneck": BottleneckAdapter(5)}  # beside a LoRA of another rank for all the rest


@pytest.mark.parametrize("method", GATED)
def test_rows_of_a_batch_may_each_have_an_adapter_of_another_kind(method: str, language_dir: Path) -> None:
    """Outputs, and the gradients of both adapters, are those of every row by itself."""
    model, given = make("ours", language_dir)
    given["input_ids"][1, :5] = given["input_ids"][0, :5]
    given["pixel_values"] = torch.cat([given["pixel_values"], -given["pixel_values"]])
    pool = AdapterPool(tune(model, [Full("projector")]))
    members = {"one": GATED[method], "other": OTHERS.get(method, LoRA(3, targets="minimal")), "third": LoRA(2)}
    for seed, (name, tuner) in enumerate(members.items()):
        pool.add(name, tuner)
        randomise(pool.parameters(name), seed)
    trained = pool.train(list(members))
    given = {key: value for key, value in given.items() if key != "labels"}

    def run(names: Sequence[str | None], row: int | None = None) -> Tensor:
        rows = slice(None) if row is None else slice(row, row + 1)
        with pool.rows(names):
            out: Tensor = model(**{key: value[rows] for key, value in given.items()}).logits
        return out

    def gradients(outs: Sequence[Tensor]) -> list[Tensor]:
        weights = torch.linspace(-1, 1, outs[0][0].numel()).view(outs[0][0].shape)
        total = sum((out * weights).sum() for out in outs)
        found = torch.autograd.grad(total, list(trained.values()), allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
        return list(found)

    base = run([None, None])
    for names in (["one", "other"], ["other", "one"], [None, "one"], ["one", "third"]):
        mixed, alone = run(names), [run([name], row) for row, name in enumerate(names)]
        torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)
        for row, name in enumerate(names):
            assert torch.allclose(mixed[row], base[row], atol=1e-4) == (name is None)
        for key, mine, theirs in zip(trained, gradients([mixed]), gradients(alone), strict=True):
            scale = max(1.0, float(theirs.abs().max()))
            assert (mine - theirs).abs().max() <= 1e-5 * scale, key
