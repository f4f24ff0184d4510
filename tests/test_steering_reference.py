"""Files as LLaVA-Steering's reference writes them, one a layer, read into our units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.routing import Routing
from vlmpeft.steering.reference import load_reference
from vlmpeft.steering.units import Units

D, LAYERS, RANK = 16, 3, 2


def reference_files(folder: Path) -> list[tuple[Tensor, nn.Linear]]:
    """U and Linear(A, b) of each layer, saved as an intervention's state dictionary is."""
    layers = []
    for layer in range(LAYERS):
        torch.manual_seed(layer)
        u = nn.init.orthogonal_(torch.empty(D, RANK))
        linear = nn.Linear(D, RANK)
        state = {**linear.state_dict(), "rotate_layer": u}
        name = f"intkey_layer.{layer}.comp.block_output.unit.pos.nunit.1#0.bin"
        torch.save(state, folder / name)
        layers.append((u, linear))
    return layers


def units(rank: int = RANK, bias: bool = True) -> Units:
    return Units(LAYERS, D, rank, lambda routing: torch.arange(5), bias=bias)


def test_the_units_compute_what_the_reference_does(tmp_path: Path) -> None:
    layers, ours = reference_files(tmp_path), units()
    load_reference(ours, tmp_path)
    h, mask = torch.randn(1, 5, D), torch.ones(1, 5, dtype=torch.bool)
    for number, (u, linear) in enumerate(layers):
        expected = h + (linear(h) - h @ u) @ u.T
        torch.testing.assert_close(ours(h, number, Routing(mask, ~mask)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: next(folder.glob("*layer.1.*")).unlink(), r"holds steering of layers \[0, 2\].*has 3"),
        (lambda folder: next(folder.glob("*layer.2.*")).write_bytes(b"no"), "cannot be read"),
        (lambda folder: torch.save({"weight": torch.zeros(1)}, next(folder.glob("*layer.0.*"))), "lacks 'bias'"),
    ],
)
def test_damaged_folders_are_refused_and_nothing_is_copied(change: Any, message: str, tmp_path: Path) -> None:
    reference_files(tmp_path)
    change(tmp_path)
    ours = units()
    before = ours.source.detach().clone()
    with pytest.raises(ModelError, match=f"M502.*{message}"):
        load_reference(ours, tmp_path)
    assert ours.source.equal(before)


def test_another_rank_is_refused(tmp_path: Path) -> None:
    reference_files(tmp_path)
    with pytest.raises(ModelError, match=r"M502.*U is \(3, 16, 2\), the units have \(3, 16, 4\)"):
        load_reference(units(4), tmp_path)
    with pytest.raises(ModelError, match="no bias"):
        load_reference(units(bias=False), tmp_path)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "canary",))

    reference_files(tmp_path)
    torch.save({"weight": Hostile()}, next(tmp_path.glob("*layer.1.*")))
    with pytest.raises(ModelError, match=r"M502.*cannot be read"):
        load_reference(units(), tmp_path)
    assert not (tmp_path / "canary").exists()
