"""LoRA (arXiv:2106.09685) and what needs no layer of its own: rank-stabilised scaling (rsLoRA, arXiv:2312.03732),
a faster B (LoRA+, arXiv:2402.12354), a frozen A (LoRA-FA, arXiv:2308.03303), other starts (PiSSA, LoftQ, orthogonal).

Letters: r rank, d_in d_out widths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice
from vlmpeft.tuners.linear import Where, check_linear, wrap_linears
from vlmpeft.tuners.lora_init import orthogonal_
from vlmpeft.tuners.lora_layers import LoftQLinear, LoRALinear, PiSSALinear
from vlmpeft.tuners.peft_folder import peft_settings, read_config
from vlmpeft.tuners.ranks import PATTERNS, Ranks, read_ranks
from vlmpeft.tuners.targets import ALL_LINEAR, find_linears

Init = Literal["default", "pissa", "loftq", "orthogonal"]
STARTED = ("pissa", "loftq")  # saved with their start
LORA_WEIGHTS = A_WEIGHT, B_WEIGHT = ("lora_A.weight", "lora_B.weight")


@TUNERS.register("lora")
@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on linear layers.

    Args:
        r: rank.
        ranks: other ranks, by the last name of a layer, such as {down_proj: 4}.
        alpha: numerator of the scale; None is twice a layer's rank.
        dropout: on the adapter's input.
        targets: "all-linear" (every linear layer of the blocks, as LLaVA and QLoRA), "minimal" (q, v), "standard"
            (q, k, v, o), a list of exact layer names, or "re:" and a regular expression for paths such as
            "3.self_attn.q_proj", the block's number first.
        part: the part whose layers are wrapped.
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        where: "all", "visual", "text" or "answer" tokens: at the others the layer stays its base.
        layers: blocks: "all", "first:N", "last:N", "first_last:N,M", "every:K", "N-M" or a list of numbers.
        init: "default" (A Kaiming-uniform, B zero), "pissa" (the base's principal part, taken off the base; saved as a
            LoRA of rank 2 r on the untouched base), "loftq" (on a quantised base: what quantisation took; saved as a
            LoRA of rank 2 r on the base before quantisation) or "orthogonal" (both non-zero, B A zero; even rank).
        loftq_iterations: how often init=loftq quantises and factors in turn; 1 leaves the quantised base as it is.
        freeze_a: LoRA-FA: A keeps its start, so that its input need not be kept for backward.
        lr: learning rate of its own; None is the run's, `optim.lr`: 2e-4 unless it is set, as LLaVA and QLoRA have it.
        lr_ratio: LoRA+: B learns so many times faster than A; the paper advises 16.
    """

    kind: ClassVar[str] = "lora"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    part: str = "language"
    rslora: bool = False
    where: Where = "all"
    layers: Choice = EVERY
    init: Init = "default"
    loftq_iterations: int = 1
    freeze_a: bool = False
    lr: float | None = None
    lr_ratio: float = 1.0
    ranks: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        check_linear(self)
        self._ranks.check()
        check(self.init in get_args(Init), "lora.init", self.init, "one of " + ", ".join(get_args(Init)))
        even = all(r % 2 == 0 for r in self._ranks.every())
        check(self.init != "orthogonal" or even, "lora.r", self.r, "an even rank with init=orthogonal")
        check(self.loftq_iterations >= 1, "lora.loftq_iterations", self.loftq_iterations, "an integer of at least 1")
        check(0 < self.lr_ratio < math.inf, "lora.lr_ratio", self.lr_ratio, "a number above 0")
        check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number in [0, 1)")
        check(self.lr is None or 0 < self.lr <= 1, "lora.lr", self.lr, "a number in (0, 1]")

    @property
    def _ranks(self) -> Ranks:
        return Ranks(self.kind, self.r, self.alpha, self.rslora, self.ranks, doubled=self.init in STARTED)

    @property
    def numerator(self) -> float:
        """alpha, with its default."""
        return self._ranks.numerator(self.r)

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return self._ranks.scale(self.r)

    def resolved(self) -> LoRA:
        """The same tuner with alpha written out, so that equal adapters compare equal."""
        alpha = self.alpha if self.ranks else self.numerator
        return dataclasses.replace(self, alpha=alpha, lr_ratio=1.0)

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: what trains of A and B of each, by name."""
        ranks = self._ranks.by_layer(find_linears(model, parts, self.part, self.targets, self.layers))
        found = wrap_linears(model, parts, self, lambda base: self._layer(base, ranks[id(base)]))
        trained = (B_WEIGHT,) if self.freeze_a else (A_WEIGHT, B_WEIGHT)
        return {name: p for name, p in found.items() if name.endswith(trained)}

    def _layer(self, base: nn.Linear, r: int) -> LoRALinear:
        given = base, r, self._ranks.scale(r), self.dropout
        if self.init == "loftq" and not base.weight.is_meta:
            layer: LoRALinear = LoftQLinear(*given, self.loftq_iterations)
        else:
            layer = PiSSALinear(*given) if self.init in STARTED else LoRALinear(*given)
        if self.init == "orthogonal":
            orthogonal_(layer.lora_A.weight, layer.lora_B.weight)
        layer.lora_A.requires_grad_(not self.freeze_a)
        return layer

    @property
    def needs_originals(self) -> bool:
        """See `ReadsOriginals`."""
        return self.init == "loftq"

    def on_whole_weights(self) -> LoRA:
        """See `ReadsOriginals`: there a LoftQ adapter is what one of PiSSA is, an update less its start."""
        return dataclasses.replace(self, init="pissa") if self.init == "loftq" else self

    def lr_factors(self, names: Iterable[str]) -> Mapping[str, float]:
        """See `HasLrFactors`."""
        return {name: self.lr_ratio for name in names if name.endswith(B_WEIGHT)}

    @property
    def in_peft(self) -> bool:
        """`peft` acts on every token."""
        return self.where == "all"

    def check_peft(self, folder: Path) -> None:
        """Raise unless an adapter folder was trained with these ranks and scales."""
        config = read_config(folder, "LORA", ("r", "lora_alpha"), PATTERNS if self.ranks else frozenset())
        self._ranks.check_folder(folder, config)

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        settings = self._ranks.settings(targets)
        return peft_settings("LORA", self.part, base, targets, lora_dropout=self.dropout, **settings)

    def to_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PeftTensors`: the start goes behind A and B, its B negative, as a LoRA of rank 2 r."""
        return {name: _joined(name, tensor, tensors) for name, tensor in tensors.items() if name.endswith(LORA_WEIGHTS)}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_peft`."""
        if self.init not in STARTED:
            return dict(tensors)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            path = name.rsplit(".", 2)[0]
            if name.endswith(A_WEIGHT):
                own, start = tensor.chunk(2)
                found |= {name: own, f"{path}.start_A": start}
            else:
                own, start = tensor.chunk(2, 1)
                found |= {name: own, f"{path}.start_B": -start}
        return found


def _joined(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A or B of a layer with its start, if it has one."""
    path = name.rsplit(".", 2)[0]
    if f"{path}.start_A" not in tensors:
        return tensor
    if name.endswith(A_WEIGHT):
        return torch.cat([tensor, tensors[f"{path}.start_A"]])
    return torch.cat([tensor, -tensors[f"{path}.start_B"]], 1)


def lora_from_peft(directory: Path, part: str = "language") -> LoRA:
    """The LoRA that a PEFT adapter folder describes; `Tuned.load` then reads its weights.

    Args: part: where the adapter sits; PEFT's file does not say.
    Raises: ModelError M502 if there is no such file, M554 for settings that this tuner does not have.
    """
    config = read_config(Path(directory), "LORA", ("r", "lora_alpha"), PATTERNS)
    alpha, ranks = read_ranks(Path(directory), config)
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise ModelError("M554", f"{directory}: target_modules={targets!r} is a pattern.", "list the layers' names.")
    names = ALL_LINEAR if isinstance(targets, str) else tuple(sorted({t.rsplit(".", 1)[-1] for t in targets or ()}))
    return LoRA(
        int(config["r"]), alpha, float(config.get("lora_dropout", 0.0)), names, part,
        rslora=bool(config.get("use_rslora")), ranks=ranks,
    )  # fmt: skip
