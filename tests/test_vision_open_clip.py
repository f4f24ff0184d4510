"""Names, tags and settings of open_clip, without any of its weights."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path

import pytest
import torch
from encoders import CASES, save

from vlmpeft.encoder import Encoder
from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.vision import load_vision


@functools.cache
def shell(name: str, layer: int = -1) -> Encoder:
    """A full-size tower without weights or memory, with the mean and std it declares."""
    with torch.device("meta"):
        return load_vision(name, weights="random", layer=layer)


def test_unknown_architectures_and_tags_are_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"M543.*did you mean 'ViT-B-32'"):
        load_vision("open_clip:ViT-B-33")
    with pytest.raises(ModelError, match=r"M543.*no weights 'laion2b_s34b_b79' of ViT-B-32.*mean 'laion2b_s34b_b79k'"):
        load_vision("open_clip:ViT-B-32:laion2b_s34b_b79")


def test_an_architecture_with_several_weights_needs_a_tag() -> None:
    with pytest.raises(ModelError, match=r"M543.*laion400m_e31.*open_clip:ViT-B-32:TAG"):
        load_vision("open_clip:ViT-B-32")


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP:webli", "ViT-B-32:openai"])
def test_mean_and_std_are_those_of_the_tag(name: str) -> None:
    import open_clip

    declared, encoder = open_clip.get_pretrained_cfg(*name.split(":")), shell(f"open_clip:{name}")
    assert (encoder.mean, encoder.std) == (tuple(declared["mean"]), tuple(declared["std"]))


def test_without_a_tag_they_are_what_all_tags_agree_on_or_must_be_given() -> None:
    assert shell("open_clip:RN50").mean == shell("open_clip:ViT-B-32:openai").mean
    with pytest.raises(ModelError, match=r"M544.*vision.mean"):
        shell("open_clip:ViT-S-32-alt")  # nobody has pretrained it


def test_siglip_of_open_clip_has_no_prefix_and_clip_has_one() -> None:
    siglip, clip = shell("open_clip:ViT-B-16-SigLIP:webli"), shell("open_clip:ViT-B-32:openai")
    assert (siglip.grid, siglip.prefix_tokens, siglip.width) == ((14, 14), 0, 768)
    assert (clip.grid, clip.prefix_tokens, clip.width) == ((7, 7), 1, 768)


def test_the_activation_is_the_one_the_tags_weights_were_trained_with() -> None:
    from open_clip.transformer import QuickGELU

    kinds = [type(m) for m in shell("open_clip:ViT-B-32:openai").modules()]
    assert QuickGELU in kinds
    assert QuickGELU not in [type(m) for m in shell("open_clip:ViT-B/32:laion2b_s34b_b79k").modules()]


def test_coca_gives_tokens_of_the_transformers_width_before_its_pooling() -> None:
    encoder = shell("open_clip:coca_ViT-B-32")
    assert (encoder.grid, encoder.width) == ((7, 7), 768)
    assert not [n for n, _ in encoder.named_parameters() if "attn_pool" in n or "ln_post" in n]


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(EnvironmentFault, match=r"E411.*pip install open_clip_torch"):
        load_vision("open_clip:ViT-B-32:openai")


def test_loading_says_nothing_and_leaves_logging_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = save(CASES["open_clip_vit"], tmp_path)
    caplog.clear()
    load_vision(name, weights="random")
    assert caplog.records == []
    assert logging.root.manager.disable == logging.NOTSET


def test_a_directory_without_weights_is_refused_not_left_random(tmp_path: Path) -> None:
    name = save(CASES["open_clip_vit"], tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match="M547"):
        load_vision(name)
