"""Prefix tuning (arXiv:2101.00190): trained keys and values before the sequence, in every block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, path_of
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.deep_prefix import DeepPrefix, PlainPrefix, ProjectedPrefix, key_shape
from vlmpeft.tuners.peft_folder import check_settings, read_config

if TYPE_CHECKING:
    from vlmpeft.tune import Tuned

NAME = "prefix_tuning"  # of the module inside the language model, and of the tuner


@TUNERS.register(NAME)
@dataclass(frozen=True)
class PrefixTuning:
    """Keys and values of `tokens` virtual tokens, which all queries of all blocks see.

    As in peft 0.21 the prefix bears no rotary position and the sequence starts at position `tokens`: peft puts it into
    the KV cache, whose length is where a model goes on counting, and adds it to positions that are given. Without given
    positions a row padded on the left starts later there, by its padding; here every row starts at `tokens`.

    Args:
        tokens: n.
        hidden: width of the MLP that makes the prefix in training, 512 or 800 in the paper; None trains the prefix
            itself. `fold` drops the MLP when training is over.
        part: "language", whose blocks get the prefix.
        lr: learning rate of its own; peft's comparison of methods (MetaMathQA) runs prefix tuning at 1e-3 and 5e-3.
    """

    kind: ClassVar[str] = NAME
    tokens: int = 20
    hidden: int | None = 512
    part: str = "language"
    lr: float | None = 1e-3

    def __post_init__(self) -> None:
        check(self.tokens >= 1, "prefix_tuning.tokens", self.tokens, "an integer of at least 1")
        check(self.hidden is None or self.hidden >= 1, "prefix_tuning.hidden", self.hidden, "at least 1, or null")
        check(self.part == "language", "prefix_tuning.part", self.part, "language, whose blocks get the prefix")
        check(self.lr is None or 0 < self.lr <= 1, "prefix_tuning.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Put the prefix before the blocks. Returns: its parameters, by name. Raises: ModelError M567."""
        shape = key_shape(parts)
        plain = self.hidden is None
        prefix = PlainPrefix(self.tokens, *shape) if plain else ProjectedPrefix(self.tokens, *shape, self.hidden or 0)
        return DeepPrefix(prefix, parts).put_into(model, parts, NAME)

    @property
    def in_peft(self) -> bool:
        """peft's file holds keys and values; what an MLP is trained with it cannot hold."""
        return self.hidden is None

    def check_peft(self, folder: Path) -> None:
        """See `PeftForm.check_peft`."""
        check_settings(folder, "PREFIX_TUNING", {"num_virtual_tokens": self.tokens})

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`; peft reads widths and number of layers off the base."""
        return {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "num_virtual_tokens": self.tokens,
            "prefix_projection": False,
            "inference_mode": True,
        }


def fold(tuned: Tuned, name: str = NAME) -> None:
    """Replace a prefix's MLP by the keys and values it makes: equal outputs, and a folder that `peft` loads.

    Args: name: of the tuner. Raises: ModelError M568 if it is no PrefixTuning.
    """
    applied = tuned.applied.get(name)
    if applied is None or not isinstance(applied.tuner, PrefixTuning):
        raise ModelError("M568", f"'{name}' is no prefix_tuning of this model.", "give the name it was applied under.")
    ours = {id(p) for p in applied.parameters.values()}
    (module,) = [m for m in tuned.model.modules() if isinstance(m, DeepPrefix) and ours & {*map(id, m.parameters())}]
    module.fold()
    path = path_of(tuned.model, module)
    parameters = {f"{path}.{key}": p for key, p in module.named_parameters()}
    tuner = dataclasses.replace(applied.tuner, hidden=None)
    tuned.applied[name] = dataclasses.replace(applied, tuner=tuner, parameters=parameters)


def prefix_from_peft(directory: Path) -> PrefixTuning:
    """The PrefixTuning of a PEFT folder; `Tuned.load` then reads its weights. Raises: ModelError M502, M554."""
    config = read_config(Path(directory), "PREFIX_TUNING", numbers=("num_virtual_tokens",))
    return PrefixTuning(int(config["num_virtual_tokens"]), hidden=None)
