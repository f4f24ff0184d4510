"""Weights files for encoders: by name, by order, and everything that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from encoders import CASES, save
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
    with pytest.raises(
        ModelError, match=rf"M542.*1 of another shape, first '{name}': \(3, 1, 4\) in the file and \(\)"
    ):
        features(tmp_path / "w.pth", by)


def test_missing_and_extra_tensors_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    less = {k: v for k, v in state.items() if k != "conv_stem.weight"}
    torch.save(less, tmp_path / "less.pth")
    torch.save({**less, "more": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ModelError, match=r"M542.*: 1 missing, first 'conv_stem.weight'\."):
        features(tmp_path / "less.pth", "name")
    with pytest.raises(ModelError, match=r"M542.*1 missing, first 'conv_stem.weight'; 1 unknown.*first 'more'"):
        features(tmp_path / "other.pth", "name")
    with pytest.raises(ModelError, match=r"M542.*: 1 unknown to the model, first 'more'"):
        features(tmp_path / "more.pth", "name")
    with pytest.raises(ModelError, match=r"M542.*holds \d+ tensors, the model \d+"):
        features(tmp_path / "more.pth", "order")


def test_another_classifier_does_not_matter(tmp_path: Path, state: dict[str, Tensor], expected: Tensor) -> None:
    torch.save({**state, "classifier.weight": torch.zeros(3, 256)}, tmp_path / "fewer.pth")
    torch.save({k: v for k, v in state.items() if not k.startswith("classifier.")}, tmp_path / "none.pth")
    assert torch.equal(features(tmp_path / "fewer.pth", "name"), expected)
    assert torch.equal(features(tmp_path / "none.pth", "name"), expected)


def test_an_encoder_inside_a_larger_model_is_found(tmp_path: Path, state: dict[str, Tensor], expected: Tensor) -> None:
    whole = {f"module.visual.{k}": v for k, v in state.items()}
    torch.save({"state_dict": {**whole, "module.text.weight": torch.zeros(1)}}, tmp_path / "w.pt")
    assert torch.equal(features(tmp_path / "w.pt", "name"), expected)


@pytest.mark.parametrize("key", ["clip", "timm_siglip", "swin", "open_clip_vit", "open_clip_timm"])
def test_a_file_gives_what_the_directory_gives(tmp_path: Path, key: str) -> None:
    case = CASES[key]
    name, image = save(case, tmp_path), torch.ones(1, 3, case.other, case.other)
    (file,) = tmp_path.glob("*.safetensors")
    whole = load_vision(name, layer=-2, image_size=case.other)(image)
    (tmp_path / "own").mkdir()
    file = file.rename(tmp_path / "own" / "w.safetensors")
    assert torch.equal(load_vision(name, layer=-2, weights=str(file), image_size=case.other)(image), whole)


def test_a_file_of_clips_both_halves_gives_its_vision_half(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 8}, text_config={**small, "vocab_size": 9}
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(image, output_hidden_states=True).hidden_states[-2][:, 1:]
    options = {"layer": -2, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    whole = load_vision(f"hf:{tmp_path}", **options)  # type: ignore[arg-type]
    file = (tmp_path / "model.safetensors").rename(tmp_path / "w.safetensors")
    loaded = load_vision(f"hf:{tmp_path}", weights=str(file), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(whole(image), expected)
    assert torch.equal(loaded(image), whole(image))


def damaged(folder: Path, change: str) -> Path:
    """A tiny CLIP directory and a weights file that lacks a tensor, has one more or one of another shape."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in sorted(tensors) if "layers.0.mlp.fc1.bias" in k)
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    else:
        tensors[name] = torch.zeros(5)
    save_file(tensors, folder / "w.safetensors", metadata={"format": "pt"})
    return folder / "w.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", r"1 missing, first '.*layers\.0\.mlp\.fc1\.bias'"),
        ("unexpected", r"1 unknown to the model, first '.*layers\.7\.mlp\.fc1\.bias'"),
        ("shape", r"1 of another shape, first '.*fc1\.bias': \(5,\) in the file and \(24,\)"),
    ],
)
def test_a_file_that_does_not_fit_a_transformers_model_is_named(tmp_path: Path, change: str, said: str) -> None:
    name = save(CASES["clip"], tmp_path)
    with pytest.raises(ModelError, match=f"M542.*{said}"):
        load_vision(name, weights=str(damaged(tmp_path, change)))


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_directory_that_lacks_a_tensor_is_refused_not_left_random(tmp_path: Path, change: str) -> None:
    name = save(CASES["clip"], tmp_path)
    damaged(tmp_path, change).replace(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"M548.*layers\.0\.mlp\.fc1\.bias"):
        load_vision(name)


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
