"""What does not fit is refused by name, whichever tuner reads it, and nothing of it is applied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import changed, state_of
from torch import Tensor
from tuner_table import EVERY, tuned_model

from vlmpeft.errors import ModelError


def first(tensors: dict[str, Tensor]) -> str:
    return min(name for name, tensor in tensors.items() if tensor.is_floating_point())


def lose(tensors: dict[str, Tensor]) -> str:
    name = first(tensors)
    del tensors[name]
    return name


def add(tensors: dict[str, Tensor]) -> str:
    tensors["a_stranger"] = torch.zeros(2)
    return "a_stranger"


def bend(tensors: dict[str, Tensor]) -> str:
    name = first(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    return name


def poison(tensors: dict[str, Tensor]) -> str:
    name = first(tensors)
    tensors[name].view(-1)[-1] = torch.nan
    return name


@pytest.mark.parametrize(("damage", "code"), [(lose, "M502"), (add, "M502"), (bend, "M502"), (poison, "M503")])
@EVERY
def test_a_file_that_does_not_fit_is_refused_whole_and_by_name(
    name: str, damage: Callable[[dict[str, Tensor]], str], code: str, language_dir: Path, tmp_path: Path
) -> None:
    model, _, tuned = tuned_model(name, "ours", language_dir)
    tuned.save(tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    tensors = load_file(file)
    culprit = damage(tensors)
    save_file(tensors, file)
    before = state_of(model)
    with pytest.raises(ModelError, match=rf"{code}.*'{culprit}'"):
        tuned.load(tmp_path)
    assert not changed(before, model)
