"""Weights files for encoders: by name, by order, and everything that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from vlmpeft.errors import ModelError
from vlmpeft.vision import load_vision

NAME = "timm:test_efficientnet"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = timm.create_model("test_efficientnet")
    for buffer in model.buffers():
        buffer.data += 1  # so that buffers count too
    return model.state_dict()


def features(weights: Path, by: str) -> Tensor:
    return load_vision(NAME, weights=str(weights), weights_by=by)(torch.ones(1, 3, 160, 160))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(state: dict[str, Tensor]) -> Tensor:
    model = timm.create_model("test_efficientnet").eval()
    model.load_state_dict(state)
    with torch.no_grad():
        out: Tensor = model.forward_features(torch.ones(1, 3, 160, 160)).flatten(2).mT
    return out


def test_weights_by_name_load_from_pickle_and_safetensors(
    tmp_path: Path, state: dict[str, Tensor], expected: Tensor
) -> None:
    from safetensors.torch import save_file

    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    assert torch.equal(features(tmp_path / "w.pth", "name"), expected)
    assert torch.equal(features(tmp_path / "w.safetensors", "name"), expected)


def test_weights_by_order_load_under_other_names(tmp_path: Path, state: dict[str, Tensor], expected: Tensor) -> None:
    torch.save({f"z{len(state) - i}.x": v for i, v in enumerate(state.values())}, tmp_path / "w.pth")
    for _ in range(2):  # the second time from the converted copy
        assert torch.equal(features(tmp_path / "w.pth", "order"), expected)


def test_a_state_dict_inside_a_checkpoint_is_found(tmp_path: Path, state: dict[str, Tensor], expected: Tensor) -> None:
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "w.pth")
    assert torch.equal(features(tmp_path / "w.pth", "name"), expected)


@pytest.mark.parametrize("by", ["name", "order"])
def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path, state: dict[str, Tensor], by: str) -> None:
    bad = dict(state)
    name = list(bad)[5]
    bad[name] = torch.zeros(3, 1, 4)
    torch.save(bad, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=rf"M542.*1 tensors differ, first '{name}'.*\(3, 1, 4\)"):
        features(tmp_path / "w.pth", by)


def test_missing_and_extra_tensors_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({k: v for k, v in state.items() if k != "conv_stem.weight"}, tmp_path / "less.pth")
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ModelError, match=r"M542.*'conv_stem.weight', which the file lacks"):
        features(tmp_path / "less.pth", "name")
    with pytest.raises(ModelError, match=r"M542.*'more', which only the file holds"):
        features(tmp_path / "more.pth", "name")
    with pytest.raises(ModelError, match=r"M542.*holds \d+ tensors, the model \d+"):
        features(tmp_path / "more.pth", "order")


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path: Path) -> None:
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="M542"):
        features(tmp_path / "w.pth", "name")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x00" * 64])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="M542"):
        features(path, "name")


def test_order_cannot_be_read_from_a_sorted_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"M542.*weights_by=name"):
        features(tmp_path / "w.safetensors", "order")
    with pytest.raises(ModelError, match="M540"):
        features(tmp_path / "none.pth", "name")
