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
from vlmpeft.tuners.linear import Where, check_where, wrap_linears
from vlmpeft.tuners.lora_init import orthogonal_
from vlmpeft.tuners.lora_layers import LoftQLinear, LoRALinear, PiSSALinear
from vlmpeft.tuners.peft_folder import peft_settings, read_config
from vlmpeft.tuners.targets import ALL_LINEAR

Init = Literal["default", "pissa", "loftq", "orthogonal"]
STARTED = ("pissa", "loftq")  # saved with their start
LORA_WEIGHTS = A_WEIGHT, B_WEIGHT = ("lora_A.weight", "lora_B.weight")


@TUNERS.register("lora")
@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on linear layers.

    Args:
        r: rank.
        alpha: numerator of the scale; None is 2 r.
        dropout: on the adapter's input.
        targets: "all-linear" (every linear layer of the blocks, as LLaVA and QLoRA), "minimal" (q, v), "standard"
            (q, k, v, o), or a list of exact layer names.
        part: the part whose layers are wrapped.
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        where: "all", "visual", "text" or "answer" tokens: at the others the layer stays its base.
        init: "default" (A Kaiming-uniform, B zero), "pissa" (the base's principal part, taken off the base; saved as a
            LoRA of rank 2 r on the untouched base), "loftq" (on a quantised base: what quantisation took; saved as a
            LoRA of rank 2 r on the base before quantisation) or "orthogonal" (both non-zero, B A zero; even rank).
        loftq_iterations: how often init=loftq quantises and factors in turn; 1 leaves the quantised base as it is.
        freeze_a: LoRA-FA: A keeps its start, so that its input need not be kept for backward.
        lr: learning rate of its own.
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
    init: Init = "default"
    loftq_iterations: int = 1
    freeze_a: bool = False
    lr: float | None = None
    lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_where(self)
        check(self.r >= 1, "lora.r", self.r, "an integer of at least 1")
        check(self.init in get_args(Init), "lora.init", self.init, "one of " + ", ".join(get_args(Init)))
        check(self.init != "orthogonal" or self.r % 2 == 0, "lora.r", self.r, "an even rank with init=orthogonal")
        check(self.loftq_iterations >= 1, "lora.loftq_iterations", self.loftq_iterations, "an integer of at least 1")
        check(0 < self.lr_ratio < math.inf, "lora.lr_ratio", self.lr_ratio, "a number above 0")
        check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number in [0, 1)")
        check(self.alpha is None or self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        check(self.lr is None or 0 < self.lr <= 1, "lora.lr", self.lr, "a number in (0, 1]")

    @property
    def numerator(self) -> float:
        """alpha, with its default."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return self.numerator / (math.sqrt(self.r) if self.rslora else self.r)

    def resolved(self) -> LoRA:
        """The same tuner with alpha written out, so that equal adapters compare equal."""
        return dataclasses.replace(self, alpha=self.numerator, lr_ratio=1.0)

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: what trains of A and B of each, by name."""
        found = wrap_linears(model, parts, self, self._layer)
        trained = (B_WEIGHT,) if self.freeze_a else (A_WEIGHT, B_WEIGHT)
        return {name: p for name, p in found.items() if name.endswith(trained)}

    def _layer(self, base: nn.Linear) -> LoRALinear:
        given = base, self.r, self.scale, self.dropout
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

    @property
    def _written(self) -> tuple[int, float]:
        """Rank and alpha of the file: one with a start holds that, too, and means the same scale."""
        if self.init not in STARTED:
            return self.r, self.numerator
        return 2 * self.r, self.numerator * (math.sqrt(2) if self.rslora else 2)

    def check_peft(self, folder: Path) -> None:
        """Raise unless an adapter folder was trained with this rank and scale: equal shapes do not tell."""
        config = read_adapter_config(folder)
        found = (config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora")))
        r, alpha = self._written
        if found != (r, alpha, self.rslora):
            ours = f"{r}, {alpha:g}, {self.rslora}"
            theirs = f"{folder} has r, alpha, rslora = {found[0]}, {found[1]:g}, {found[2]}"
            fix = "apply the tuner it was trained with, or lora_from_peft(directory)."
            raise ModelError("M502", f"{theirs}; the tuner here has {ours}.", fix)

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        r, alpha = self._written
        options = {"r": r, "lora_alpha": alpha, "lora_dropout": self.dropout, "use_rslora": self.rslora}
        return peft_settings("LORA", self.part, base, targets, **options)

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
                found |= {name: tensor[: self.r], f"{path}.start_A": tensor[self.r :]}
            else:
                found |= {name: tensor[:, : self.r], f"{path}.start_B": -tensor[:, self.r :]}
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
    config = read_adapter_config(Path(directory))
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise ModelError("M554", f"{directory}: target_modules={targets!r} is a pattern.", "list the layers' names.")
    names = ALL_LINEAR if isinstance(targets, str) else tuple(sorted({t.rsplit(".", 1)[-1] for t in targets or ()}))
    return LoRA(
        int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout", 0.0)), names, part,
        rslora=bool(config.get("use_rslora")),
    )  # fmt: skip


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder that describes plain LoRA. Raises: ModelError M502, M554."""
    return read_config(directory, "LORA", numbers=("r", "lora_alpha"))
