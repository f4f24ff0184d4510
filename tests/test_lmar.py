"""LMAR on attention made by hand: closed formulas, the dense definition, pads, chunks, memory, statistics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmpeft.routing import Routing
from vlmpeft.steering.attention import Asked, Call, asked_of, attended
from vlmpeft.steering.statistics import numbers, summarise

SCOPES = ["instruction", "prompt", "all"]


def routing_for(layout: str, labels: bool = True) -> Routing:
    """A letter a token: s system, i image, u user, t template, a answer, . padding; rows separated by a space."""
    rows = layout.split()

    def mask(letters: str) -> Tensor:
        return torch.tensor([[c in letters for c in row] for row in rows])

    answer = mask("a")
    predict = F.pad(answer[:, 1:], (0, 1))
    known = (answer, predict) if labels else (None, None)
    return Routing(mask("i"), mask("suta"), *known, instruction=mask("u"))


def causal_mask(routing: Routing) -> Tensor:
    """(b, 1, s, s) bool: real keys that are not after the query."""
    real = routing.visual | routing.text
    size = real.shape[1]
    return torch.ones(size, size, dtype=torch.bool).tril() & real[:, None, None, :]


def random_call(routing: Routing, heads: int = 4, key_heads: int = 4, width: int = 8, **options: Any) -> Call:
    generator = torch.Generator().manual_seed(0)
    b, s = routing.visual.shape
    query, key = (torch.randn(b, h, s, width, generator=generator) for h in (heads, key_heads))
    return Call(query, key, causal_mask(routing), **options)


def dense(call: Call, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
    """The definition written out with the whole attention matrix, sample by sample and query by query."""
    groups = call.query.shape[1] // call.key.shape[1]
    logits = call.query @ call.key.repeat_interleave(groups, 1).mT / math.sqrt(call.query.shape[-1])
    assert call.mask is not None
    visible = call.mask.expand(logits.shape)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    out = []
    for b in range(len(logits)):
        image, text, mass = [], [], []
        for row in asked.rows[b][asked.real[b]].tolist():
            on = [weights[b, :, row, (x[b] & visible[b, 0, row])] for x in (asked.image, asked.text)]
            mass.append(on[0].sum(-1))
            if on[0].shape[-1] and on[1].shape[-1]:
                image.append(on[0].mean(-1))
                text.append(on[1].mean(-1))
        out.append([torch.stack(x).mean(0) for x in (image, text, mass)])
    image, text, mass = (torch.stack(x) for x in zip(*out, strict=True))
    return image, text, mass


LAYOUTS = ["ssiiiiuuutaaa", "iuutaa", "suiiiiiiiiiiiiiiuuutaaaaaa ..siiuuutaaaa......", ".....siiuta suiiiiuutaa"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("queries", ["output", "all_text"])
@pytest.mark.parametrize("sink", [0, 1])
def test_uniform_attention_gives_exactly_one(layout: str, scope: Any, queries: Any, sink: int) -> None:
    layout = " ".join(row.ljust(26, ".") for row in layout.split())
    routing = routing_for(layout)
    call = random_call(routing)
    found = attended(replace(call, query=call.query * 0), asked_of(routing, scope, queries, sink))
    torch.testing.assert_close(found.image / found.text, torch.ones(len(call.query), 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [-3.0, 0.0, 0.5, 2.0])
def test_a_logit_raised_by_c_on_the_image_gives_e_to_the_c(c: float) -> None:
    routing = routing_for("siiiiiuutaaa ..siiuuutaaa")
    query = torch.ones(2, 3, 12, 1)
    key = torch.where(routing.visual, c, 0.0)[:, None, :, None].expand(-1, 3, -1, -1)
    routing_call = Call(query, key, causal_mask(routing), scale=1.0)
    for scope in SCOPES:
        found = attended(routing_call, asked_of(routing, scope, "output", 0))  # type: ignore[arg-type]
        torch.testing.assert_close(found.image / found.text, torch.full((2, 3), math.exp(c)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("queries", ["output", "all_text"])
def test_it_equals_the_dense_definition_in_any_chunks(key_heads: int, chunk: int, queries: Any) -> None:
    routing = routing_for("ssiiiiuutaaa ...suiiutaa. iuuuuuutaaaa")
    call = random_call(routing, key_heads=key_heads)
    asked = asked_of(routing, "prompt", queries, 0)
    found = attended(call, asked, chunk)
    for ours, theirs in zip((found.image, found.text, found.mass), dense(call, asked), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_causal_without_a_mask_equals_the_causal_mask() -> None:
    routing = routing_for("siiiuutaaa suiiiutaaa")
    call = random_call(routing)
    asked = asked_of(routing, "all", "output", 0)
    one, other = attended(call, asked), attended(replace(call, mask=None, causal=True), asked)
    assert one.image.equal(other.image)
    assert one.mass.equal(other.mass)


def test_an_added_mask_equals_a_boolean_one_and_a_bias_is_part_of_the_logits() -> None:
    routing = routing_for("siiiuutaaa ..siiiutaa")
    call = random_call(routing)
    assert call.mask is not None
    asked = asked_of(routing, "prompt", "output", 0)
    least = torch.finfo(torch.float32).min
    added = torch.zeros(call.mask.shape).masked_fill(~call.mask, least)
    assert attended(call, asked).image.equal(attended(replace(call, mask=added), asked).image)
    tilted = added + torch.where(routing.visual, 1.5, 0.0)[:, None, None, :]
    flat = replace(call, query=call.query * 0, mask=tilted)
    found = attended(flat, asked)
    torch.testing.assert_close(found.image / found.text, torch.full((2, 4), math.exp(1.5)), rtol=1e-6, atol=0)


def test_tokens_a_turn_cannot_see_are_not_counted() -> None:
    routing = routing_for("siiiuuutaaa")
    mask = causal_mask(routing).clone()
    mask[..., 8:, 4:6] = False  # the answer sees the last of three user tokens only
    uniform = replace(random_call(routing), query=torch.zeros(1, 4, 11, 8), mask=mask)
    found = attended(uniform, asked_of(routing, "instruction", "output", 0))
    torch.testing.assert_close(found.image / found.text, torch.ones(1, 4), rtol=1e-6, atol=0)
    mask[..., 7:, 1:4] = False  # as in a layer whose window has left the image behind
    gone = attended(replace(uniform, mask=mask), asked_of(routing, "instruction", "output", 0))
    assert gone.image.isnan().all()
    assert gone.mass.equal(torch.zeros(1, 4))


def test_shares_of_image_text_and_rest_sum_to_one() -> None:
    routing = routing_for("ssiiiiuutaaa ...suiiutaa.")
    call, asked = random_call(routing), asked_of(routing, "instruction", "output", 0)
    rest = routing.text & ~asked.text
    total = sum(attended(call, replace(asked, image=x)).mass for x in (asked.image, asked.text, rest))
    torch.testing.assert_close(total, torch.ones(2, 4), rtol=1e-6, atol=0)


def test_the_order_of_image_keys_does_not_matter() -> None:
    routing = routing_for("ssiiiiiiuutaaa")
    call, asked = random_call(routing), asked_of(routing, "prompt", "output", 0)
    order = torch.arange(14)
    order[2:8] = order[2:8][torch.tensor([3, 0, 5, 1, 4, 2])]
    one, other = attended(call, asked), attended(replace(call, key=call.key[:, :, order]), asked)
    torch.testing.assert_close(one.image / one.text, other.image / other.text, rtol=1e-6, atol=0)


def test_the_ratio_rises_with_the_images_logits() -> None:
    routing = routing_for("ssiiiiuutaaa")
    call, asked = random_call(routing), asked_of(routing, "prompt", "output", 0)
    along = call.query[:, :, 8:].mean(2, keepdim=True)  # a direction that every head's queries share
    ratios = []
    for step in (0.0, 0.3, 0.6, 1.2):
        key = call.key + step * along * routing.visual[:, None, :, None]
        found = attended(replace(call, key=key), asked)
        ratios.append(float(found.image.mean() / found.text.mean()))
    assert ratios == sorted(set(ratios))


@pytest.mark.parametrize(
    ("scope", "queries", "sink", "text", "rows"),
    [
        ("instruction", "output", 0, "000000110000", [8, 9, 10]),
        ("prompt", "output", 0, "110000111000", [8, 9, 10]),
        ("all", "output", 0, "110000111111", [8, 9, 10]),
        ("prompt", "output", 1, "010000111000", [8, 9, 10]),
        ("prompt", "all_text", 3, "000000111000", [0, 1, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_scopes_and_queries_choose_the_tokens_they_name(
    scope: Any, queries: Any, sink: int, text: str, rows: list[int]
) -> None:
    asked = asked_of(routing_for("ssiiiiuutaaa"), scope, queries, sink)
    assert "".join(str(int(x)) for x in asked.text[0]) == text
    assert sorted(asked.rows[0].tolist()) == rows
    assert asked.real.all()


def test_without_labels_the_last_real_token_is_the_query_on_either_side_of_padding() -> None:
    asked = asked_of(routing_for("siiut.. ..siiut", labels=False), "all", "output", 0)
    assert asked.rows.tolist() == [[4], [6]]


def test_a_sink_counts_real_tokens_only() -> None:
    asked = asked_of(routing_for("..siiut siiut.."), "prompt", "output", 1)
    assert asked.text.int().tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0]]


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_nothing_of_sequence_by_sequence_is_made() -> None:
    size, heads, width = 600, 2, 4
    routing = routing_for("s" + "i" * 400 + "u" * 150 + "t" + "a" * 48)
    call = replace(random_call(routing, heads, heads, width), mask=None, causal=True)
    with Largest() as largest:
        attended(call, asked_of(routing, "prompt", "output", 0), chunk=8)
    assert largest.elements == heads * 8 * size  # weights of one chunk; the whole would be 37 times that
    with Largest() as largest:
        (call.query @ call.key.mT).softmax(-1)
    assert largest.elements == heads * size * size  # the recorder sees what the probe must not make


def test_the_mean_of_ratios_is_not_the_ratio_of_means() -> None:
    """Eq. 2 averages the samples' ratios: alpha of (8, 2) and (1, 4) gives (4 + 1/4) / 2, not 9 / 6."""
    rho = torch.tensor([[8.0 / 2.0], [1.0 / 4.0]])
    assert summarise(rho).mean.item() == 2.125


def test_one_sample_is_its_own_mean_median_and_interval() -> None:
    rho = torch.tensor([[0.5, 3.0]])
    found = summarise(rho)
    for value in (found.mean, found.median, found.low, found.high):
        assert value.tolist() == [0.5, 3.0]


def test_duplicating_or_reordering_all_samples_changes_no_mean() -> None:
    rho = torch.rand(7, 3, dtype=torch.float64)
    once, twice = summarise(rho), summarise(torch.cat([rho, rho.flip(0)]))
    torch.testing.assert_close(once.mean, twice.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(once.median, twice.median, rtol=1e-12, atol=0)
    assert (twice.high - twice.low < once.high - once.low).all()


def test_the_interval_is_that_of_the_normal_limit_and_comes_from_its_seed() -> None:
    rho = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)) * 3 + 5
    found = summarise(rho, resamples=4000)
    half = 1.96 * rho.double().std(0) / 20
    torch.testing.assert_close(found.high - found.low, 2 * half, rtol=0.05, atol=0)
    assert summarise(rho, seed=1).low.equal(summarise(rho, seed=1).low)
    assert not summarise(rho, seed=1).low.equal(summarise(rho, seed=2).low)


def test_samples_without_a_value_in_a_layer_are_left_out_there() -> None:
    rho = torch.tensor([[1.0, torch.nan], [3.0, torch.nan], [2.0, torch.nan]])
    found = summarise(rho)
    assert numbers(found.mean) == [2.0, None]
    assert numbers(found.median) == [2.0, None]
    rho[1, 1] = 4.0
    assert numbers(summarise(rho).mean) == [2.0, 4.0]
    assert numbers(summarise(torch.zeros(0, 2)).mean) == [None, None]
