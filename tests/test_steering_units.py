"""The steering's mathematics: projection laws, the dense formula, gradients, orthonormality (spec of MoReS, LoReFT)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_lmar import Largest
from torch import Tensor

from vlmpeft.routing import Routing
from vlmpeft.steering import positions
from vlmpeft.steering.lowrank import LowRankEdit
from vlmpeft.steering.mores import IndexOf
from vlmpeft.steering.units import Units, orthonormal

D, LAYERS = 24, 3
INDEX = torch.tensor([1, 4, 5, 13])


def units(rank: int, **options: Any) -> Units:
    torch.manual_seed(rank)
    return Units(LAYERS, D, rank, lambda routing: INDEX, **({"identity": False} | options))


def routing() -> Routing:
    mask = torch.ones(2, 8, dtype=torch.bool)
    return Routing(mask, ~mask)


def hidden(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 8, D, generator=torch.Generator().manual_seed(9), dtype=dtype)


def double(steering: Units) -> Units:
    return steering.double()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_projection_laws_hold(rank: int) -> None:
    steering, h = double(units(rank)), hidden()
    with torch.no_grad():
        for layer in range(LAYERS):
            after = steering(h, layer, routing()).flatten(0, 1)[INDEX]
            before = h.flatten(0, 1)[INDEX]
            u, a, b = orthonormal(steering.rotation)[layer], steering.source[layer], steering.bias[layer]
            torch.testing.assert_close(after @ u, before @ a.T + b, rtol=0, atol=1e-12)
            rest = (after - before) - (after - before) @ u @ u.T
            torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_output_is_that_of_a_loop_over_tokens(rank: int) -> None:
    steering, h = units(rank), hidden(torch.float32)
    out = steering(h, 1, routing())
    expected = h.clone()
    u = torch.linalg.qr(steering.rotation[1]).Q
    u = u * torch.sign((u * steering.rotation[1]).sum(0))  # a diagonal above zero
    for place in INDEX.tolist():
        row, column = divmod(place, 8)
        x = h[row, column]
        expected[row, column] = x + u @ (steering.source[1] @ x + steering.bias[1] - u.T @ x)
    assert ((out - expected).norm(dim=-1) <= 1e-6 * expected.norm(dim=-1)).all()
    untouched = [i for i in range(16) if i not in INDEX.tolist()]
    assert out.flatten(0, 1)[untouched].equal(h.flatten(0, 1)[untouched])


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_basis_is_that_of_a_qr_with_a_positive_diagonal(rank: int) -> None:
    v = torch.randn(5, 40, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(v)
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[:, None]
    torch.testing.assert_close(orthonormal(v), q)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_basis_stays_orthonormal_through_training_and_a_round_trip(decay: float) -> None:
    steering, target = units(4), hidden(torch.float32)

    def train(steering: Units, steps: int) -> None:
        optimizer = torch.optim.AdamW(steering.parameters(), lr=1e-2, weight_decay=decay)
        for _ in range(steps):
            out = steering(target, 0, routing())
            (out.flatten(0, 1)[INDEX].pow(2).sum() + sum(p.sum() for p in steering.parameters())).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(steering, 100)
    again = units(4)
    again.load_state_dict(steering.state_dict())
    train(again, 50)
    for each in (steering, again):
        u = orthonormal(each.rotation.detach())
        assert (u.mT @ u - torch.eye(4)).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("constrained", [True, False])
def test_gradients_are_those_of_finite_differences(rank: int, constrained: bool) -> None:
    steering, h = double(units(rank, constrained=constrained)), hidden().requires_grad_()
    names = [name for name, _ in steering.named_parameters()]

    def run(h: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(steering, dict(zip(names, values, strict=True)), (h, 1, routing()))

    assert torch.autograd.gradcheck(run, (h, *(p.detach().requires_grad_() for p in steering.parameters())))


def test_turning_the_basis_changes_nothing() -> None:
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(1, D, 3, dtype=torch.float64)).Q
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    c, b, h = torch.randn(3, D, dtype=torch.float64), torch.randn(3, dtype=torch.float64), hidden()
    free = double(units(3, constrained=False))
    outs = []
    for basis, down, bias in ((u, c, b), (u @ turn, turn.T @ c, turn.T @ b)):
        with torch.no_grad():
            free.rotation[0], free.source[0] = basis[0], down
            free.bias[0] = bias
        outs.append(free(h, 0, routing()))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-12)


def test_rank_one_is_the_householder_parametrisation_at_an_equal_basis() -> None:
    linear = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(1, D, bias=False), orthogonal_map="householder")
    steering, h = units(1), hidden(torch.float32)
    with torch.no_grad():
        steering.rotation[2] = 3.0 * linear.weight
    u = linear.weight
    x = h.flatten(0, 1)[INDEX]
    expected = x + (x @ steering.source[2].T + steering.bias[2] - x @ u) @ u.T
    torch.testing.assert_close(steering(h, 2, routing()).flatten(0, 1)[INDEX], expected)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("constrained", [True, False])
def test_identity_init_edits_nothing_and_gets_a_gradient(rank: int, constrained: bool) -> None:
    steering, h = units(rank, identity=True, constrained=constrained), hidden(torch.float32)
    out = steering(h, 0, routing())
    assert out.equal(h)
    (out**2).sum().backward()
    assert steering.source.grad is not None
    assert steering.source.grad[0].abs().sum() > 0


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_reference_init_moves_a_hidden_state_by_the_published_amount(rank: int) -> None:
    width = 512
    torch.manual_seed(0)
    steering = Units(4, width, rank, lambda routing: torch.arange(400), identity=False)
    h = torch.randn(1, 400, width)
    moved = (steering(h, 0, routing()) - h).norm(dim=-1) / h.norm(dim=-1)
    expected = math.sqrt(4 * rank / (3 * width))
    assert expected / 3 < moved.mean() < expected * 3


def test_dropout_acts_on_the_edit_alone_and_rests_in_eval() -> None:
    torch.manual_seed(0)
    steering, h = units(2, dropout=0.5), hidden(torch.float32)
    plain = steering.eval()(h, 0, routing())
    assert steering(h, 0, routing()).equal(plain)
    steering.train()
    outs = torch.stack([steering(h, 0, routing()) for _ in range(4000)])
    edits = (outs - h).flatten(1, 2)[:, INDEX]
    full = (plain - h).flatten(0, 1)[INDEX]
    torch.testing.assert_close(edits.mean(0), full, rtol=0.15, atol=0.05)
    dropped = (edits.abs() < 1e-6).float().mean()
    assert abs(float(dropped) - 0.5) < 0.02  # the edit goes, the hidden state stays


def test_two_forwards_keep_their_own_edit() -> None:
    steering, h = units(2), hidden(torch.float32)
    first, second = routing(), routing()
    a, b = steering(h, 0, first), steering(2 * h, 0, second)
    assert first.memo[steering] is not second.memo[steering]
    a.sum().backward()
    b.sum().backward()
    together = {name: p.grad.clone() for name, p in steering.named_parameters() if p.grad is not None}
    steering.zero_grad()
    (steering(h, 0, routing()).sum() + steering(2 * h, 0, routing()).sum()).backward()
    for name, p in steering.named_parameters():
        torch.testing.assert_close(p.grad, together[name])


@pytest.mark.parametrize("dropped", [False, True])
def test_the_edits_own_backward_is_that_of_pytorchs_operations(dropped: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {"hidden": (2, 8, D), "up": (D, 2), "down": (2, D), "bias": (2,)}
    keep = (torch.rand(len(INDEX), D, generator=generator) > 0.5) * 2.0 if dropped else None
    values = {k: torch.randn(shape, generator=generator).requires_grad_() for k, shape in shapes.items()}
    weight = torch.randn(2, 8, D, generator=generator)

    def composed(hidden: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        delta = (flat[INDEX] @ down.T + bias) @ up.T * (1.0 if keep is None else keep)
        return flat.index_add(0, INDEX, delta).view(hidden.shape)

    def edited(hidden: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = LowRankEdit.apply(hidden, INDEX, up, down, bias, keep)  # type: ignore[no-untyped-call]
        return out

    outs = [composed(**values), edited(**values)]
    torch.testing.assert_close(outs[1], outs[0])
    first, second = (torch.autograd.grad((out * weight).sum(), list(values.values())) for out in outs)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("rank", [1, 4])
def test_nothing_of_width_by_width_is_made(rank: int) -> None:
    width, layers = 300, 2
    steering = Units(layers, width, rank, lambda routing: INDEX, identity=False)
    with Largest() as largest:
        for layer in range(layers):
            steering(torch.randn(2, 8, width, requires_grad=True), layer, routing()).sum().backward()
    assert largest.elements == max(16, layers * rank) * width  # hidden states, or one stack of parameters
    assert sum(b.numel() for b in steering.buffers()) == 0


@pytest.mark.parametrize("rank", [1, 4])
def test_nothing_is_read_back_from_the_device(rank: int) -> None:
    """On the meta device, which has no values, whatever asks for one fails."""
    choice = IndexOf(positions.parse("first_last:1,2"), "visual")
    steering = Units(LAYERS, D, rank, choice, dropout=0.1, device=torch.device("meta"))
    mask = torch.ones(2, 8, dtype=torch.bool, device="meta")
    known = Routing(mask, ~mask, images=(4, 4))
    hidden = torch.empty(2, 8, D, device="meta", requires_grad=True)
    out = hidden
    for layer in range(LAYERS):
        out = steering.steer(out, layer, steering.edit(known))
    assert known.memo[steering].index.shape == (6,)
    out.sum().backward()
    assert hidden.grad is not None
    with pytest.raises((RuntimeError, NotImplementedError)):  # the host does not know how many images there are
        steering.edit(Routing(mask, ~mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_host_model_leaves_the_units_in_fp32(dtype: torch.dtype) -> None:
    host = torch.nn.Sequential(torch.nn.Linear(2, 2), units(4))
    before = {k: v.clone() for k, v in host[1].state_dict().items()}
    host.to(dtype).float()
    assert {p.dtype for p in host[0].parameters()} == {torch.float32}
    host.to(dtype)
    assert {p.dtype for p in host[0].parameters()} == {dtype}
    assert all(v.equal(before[k]) for k, v in host[1].state_dict().items())
    assert all(p.requires_grad for p in host[1].parameters())
    u = orthonormal(host[1].rotation.detach())  # type: ignore[arg-type, operator, union-attr]
    assert (u.mT @ u - torch.eye(4)).abs().max() < 1e-6
