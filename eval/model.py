"""The model of a command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpeft.errors import ConfigError

if TYPE_CHECKING:
    from vlmpeft.build import Bundle
    from vlmpeft.hf_vlm import HFModel

HF = "hf:"


def open_model(name: str, device: str = "auto") -> Bundle | HFModel:
    """A model directory of ours, or `hf:DIR_OR_ID`: any model of transformers that answers questions about images.

    Raises: ConfigError C102 for `hf:` alone; as `vlmpeft.load`, or as `vlmpeft.hf_vlm.load_hf`.
    """
    if name == HF:
        raise ConfigError("C102", f"model={HF} names no model.", f"write model={HF}DIR_OR_ID.")
    if name.startswith(HF):
        from vlmpeft.hf_vlm import load_hf

        return load_hf(name.removeprefix(HF), device)
    import vlmpeft

    return vlmpeft.load(name, device=device)
