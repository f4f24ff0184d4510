"""What the tests of projectors share: small projectors of every kind, and equality with a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmpeft.projectors import PROJECTORS

Tensors = dict[str, Tensor]
SMALL: dict[str, dict[str, Any]] = {  # options that keep the big ones small
    "resampler": {"queries": 6, "depth": 2, "heads": 2, "dim_head": 8},
    "qformer": {"queries": 5, "depth": 3, "width": 24, "heads": 2},
}
NAMES = [*PROJECTORS, "mlp3x_gelu"]


def build(name: str, in_dim: int = 32, out_dim: int = 48, **options: Any) -> Any:
    return PROJECTORS.build(name, in_dim, out_dim, **options)


def small(name: str, grid: tuple[int, int] | None = None, **options: Any) -> Any:
    """A small projector for features 32 wide, told its grid if it asks for one."""
    projector = build(name, 32, 32 if name == "identity" else 48, **SMALL.get(name, {}), **options)
    if grid is not None and hasattr(projector, "input_grid"):
        projector.input_grid = grid
    return projector


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def features(n: int, width: int = 32, images: int = 2) -> Tensor:
    return torch.randn(images, n, width, generator=torch.Generator().manual_seed(n))


def randomised(module: nn.Module) -> Any:
    """Every parameter random, LayerNorms too, so that no swap of two tensors goes unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


def assert_same_outputs_and_gradients(
    ours: nn.Module, reference: nn.Module, x: Tensor, rename: Callable[[Tensors], Tensors] = dict
) -> None:
    """Equal to 1e-5 after the reference took our weights. Args: rename: our tensors under the reference's names."""
    reference.load_state_dict(rename(dict(randomised(ours).state_dict())), strict=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a), reference(b)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    mine = {"input": a.grad, **rename({name: cast(Tensor, p.grad) for name, p in ours.named_parameters()})}
    theirs = {"input": b.grad, **{name: p.grad for name, p in reference.named_parameters()}}
    assert mine.keys() == theirs.keys()
    for name, wanted in theirs.items():
        grad, wanted = cast(Tensor, mine[name]), cast(Tensor, wanted)
        assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-5, name
