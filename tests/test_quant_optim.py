"""The optimizers of bitsandbytes: the same steps as torch's AdamW, in the memory their names say."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import nn

from vlmpeft.optim import make_optimizer, optimizer_note, restored
from vlmpeft.recipe import OptimConfig

CPU = torch.device("cpu")
NAMES = ("adamw8bit", "paged_adamw8bit", "paged_adamw32bit")


def stepped(name: str, steps: int = 5) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """A matrix after some steps with gradients that do not change."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 128))
    group = {"params": [parameter], "parameter_names": ["a"], "name": "a", "weight_decay": 0.1}
    optimizer = make_optimizer([group], OptimConfig(name=name, betas=(0.8, 0.95), eps=1e-6), CPU)  # type: ignore[arg-type]
    optimizer.param_groups[0]["lr"] = 1e-2
    for _ in range(steps):
        parameter.grad = torch.randn(64, 128)
        optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize(("name", "tolerance"), [("paged_adamw32bit", 1e-6), ("adamw8bit", 1e-2)])
def test_they_make_the_steps_of_adamw(name: str, tolerance: float) -> None:
    expected, found = stepped("adamw")[1], stepped(name)[1]
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (found - stepped(name, steps=0)[1]).norm() > 0.02 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_without_cuda_they_are_the_same_without_pages(name: str) -> None:
    optimizer, parameter = stepped(name)
    assert isinstance(optimizer, bitsandbytes.optim.optimizer.Optimizer8bit)
    assert not optimizer.is_paged
    state = optimizer.state[parameter]
    assert state["state1"].dtype == (torch.uint8 if "8bit" in name else torch.float32)
    note = optimizer_note(name, "cpu")
    assert (note is None) is not name.startswith("paged_")
    assert note is None or f"{name.removeprefix('paged_')} without paging" in note
    assert optimizer_note(name, "cuda") is None


def test_a_paged_optimizer_gets_its_moments_back_in_a_buffer_of_its_own(recwarn: pytest.WarningsRecorder) -> None:
    optimizer, parameter = stepped("paged_adamw8bit")
    saved = optimizer.state[parameter]["state1"]
    assert restored(optimizer, parameter, "state1", saved) is saved
    optimizer.is_paged = True  # type: ignore[attr-defined]
    buffer = restored(optimizer, parameter, "state1", saved)
    assert isinstance(buffer, torch.Tensor)
    assert buffer is not saved
    assert torch.equal(buffer, saved)
    assert restored(optimizer, parameter, "absmax1", saved) is saved


def test_steps_come_back_as_the_numbers_they_were() -> None:
    optimizer, parameter = stepped("adamw8bit", steps=1)
    assert restored(optimizer, parameter, "step", torch.tensor(3)) == 3
    assert isinstance(restored(optimizer, parameter, "step", torch.tensor(3)), int)
    assert isinstance(restored(optimizer, parameter, "step", torch.tensor(3.0)), torch.Tensor)  # torch's AdamW
