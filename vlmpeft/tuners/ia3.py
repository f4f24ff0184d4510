"""(IA)^3 (arXiv:2205.05638): keys, values and the MLP's inner activations scaled by learned vectors.

Letters: b batch, s sequence, d_in d_out widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice
from vlmpeft.tuners.linear import AdaptedLinear, Where, chain, check_linear, wrap_linears
from vlmpeft.tuners.peft_folder import read_config
from vlmpeft.tuners.targets import find_linears


class IA3Linear(AdaptedLinear):
    """base(x) * l, or base(x * l) for a layer of the MLP, with l (d_out, 1) or (1, d_in) in fp32, ones at the start.

    The product is rounded to the base's dtype, so that at the start the layer is its base bit for bit.
    """

    def __init__(self, base: nn.Linear, feedforward: bool) -> None:
        super().__init__(base)
        self.feedforward = feedforward
        shape = (1, base.in_features) if feedforward else (base.out_features, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, device=base.weight.device, dtype=torch.float32))
        self.bias_from: Tensor | None = None  # the base's bias as it was before `merge`

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out) in the base's dtype."""
        if self.feedforward and self.where == "all" and self.slot is None and self.enabled and not self.merged:
            return self._scaled_input(x)  # the base runs once
        return super().forward(x)

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`."""
        return self._scaled_input(x) if self.feedforward else (out * self.ia3_l.flatten()).to(out.dtype)

    def _scaled_input(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer((x * self.ia3_l.flatten()).to(x.dtype))
        return out

    def delta(self) -> Tensor:
        """What scaling adds to the base weight, (d_out, d_in)."""
        return self.weight * (self.ia3_l - 1)

    @property
    def _bias(self) -> Tensor | None:
        """The base's bias (d_out,), if it is scaled too."""
        plain = list(chain(self))[-1]
        return plain.bias if isinstance(plain, nn.Linear) and not self.feedforward else None

    @torch.no_grad()
    def merge(self) -> None:
        """See `AdaptedLinear.merge`; the bias of a layer whose output is scaled goes with its weight."""
        if not self.merged and self._bias is not None:
            self.bias_from = self._bias.detach().clone()
            self._bias.copy_(self._bias * self.ia3_l.flatten())
        super().merge()

    @torch.no_grad()
    def unmerge(self) -> None:
        """See `AdaptedLinear.unmerge`."""
        if self.bias_from is not None and self._bias is not None:
            self._bias.copy_(self.bias_from)
        self.bias_from = None
        super().unmerge()

    def settle(self) -> None:
        """See `AdaptedLinear.settle`."""
        super().settle()
        self.bias_from = None


@TUNERS.register("ia3")
@dataclass(frozen=True)
class IA3:
    """Scale what some linear layers give, or what they take, by learned vectors.

    Args:
        targets: as LoRA's; the defaults are the paper's choice in a model with a gated MLP.
        feedforward: those of the targets whose input is scaled, not their output.
        part: the part whose layers are scaled.
        where: "all", "visual", "text" or "answer" tokens: at the others the layer stays its base.
        layers: as LoRA's.
        lr: learning rate of its own; the default is the paper's (its section 3.6).
    """

    kind: ClassVar[str] = "ia3"
    decays: ClassVar[bool] = False  # the vectors start at one
    targets: str | tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = ("down_proj",)
    part: str = "language"
    where: Where = "all"
    layers: Choice = EVERY
    lr: float | None = 3e-3

    def __post_init__(self) -> None:
        check_linear(self)
        among = isinstance(self.targets, str) or set(self.feedforward) <= set(self.targets)
        check(among, "ia3.feedforward", self.feedforward, "names that are among ia3.targets, or none")
        check(self.lr is None or 0 < self.lr <= 1, "ia3.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: the vector of each, by name."""
        inputs: set[int] = set()
        if self.feedforward:
            inputs = {
                id(layer) for layer in find_linears(model, parts, self.part, self.feedforward, self.layers).values()
            }
        return wrap_linears(model, parts, self, lambda base: IA3Linear(base, id(base) in inputs))

    @property
    def in_peft(self) -> bool:
        """`peft` acts on every token."""
        return self.where == "all"

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        return {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM" if self.part in ("language", "lm_head") else None,
            "base_model_name_or_path": base,
            "target_modules": targets,
            "feedforward_modules": [t for t in targets if t.rsplit(".", 1)[-1] in self.feedforward],
            "inference_mode": True,
        }

    def check_peft(self, folder: Path) -> None:
        """Raise unless an adapter folder scales the inputs of the same layers: equal widths would not tell."""
        inputs = read_config(folder, "IA3").get("feedforward_modules")
        if not isinstance(inputs, list):
            message = f"{folder} has feedforward_modules={inputs!r}, which is no list."
            raise ModelError("M554", message, "list the layers' names.")
        if {str(name).rsplit(".", 1)[-1] for name in inputs} != set(self.feedforward):
            message = f"{folder} scales the inputs of {sorted(inputs)}; the tuner here those of {self.feedforward}."
            raise ModelError("M502", message, "apply the tuner it was trained with.")
