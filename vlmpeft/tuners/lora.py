"""LoRA (arXiv:2106.09685) and its rank-stabilised scaling (arXiv:2312.03732). Letters: r rank, d_in d_out widths."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.linear import ALL_LINEAR, AdaptedLinear, find_linears, replace_module


class LoRALinear(AdaptedLinear):
    """base(x) + scale * B A dropout(x), with A (r, d_in), B (d_out, r) in fp32 on a base of any dtype.

    Initialised as loralib does (loralib/layers.py:119): A Kaiming-uniform with a = sqrt(5), B zero, so that the layer
    starts as its base.
    """

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scale, self.enabled = scale, True
        self.merged_from: Tensor | None = None  # the base weight as it was before `merge`

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out) in the base's dtype."""
        out: Tensor = self.base_layer(x)
        if not self.enabled or self.merged_from is not None:
            return out
        low = self.lora_A(self.dropout(self._to_adapter(x)))  # (..., r)
        return out + (self.lora_B(low) * self.scale).to(out.dtype)

    def _to_adapter(self, x: Tensor) -> Tensor:
        """Autocast chooses the dtype of the products; without it the adapter computes in its own."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.weight.dtype)

    def delta(self) -> Tensor:
        """The weight update scale * B A, (d_out, d_in), fp32."""
        return (self.lora_B.weight @ self.lora_A.weight) * self.scale

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the base weight; `unmerge` brings the old weight back bit for bit."""
        weight = self.base_layer.weight
        if self.merged_from is None and isinstance(weight, Tensor):
            self.merged_from = weight.detach().clone()
            weight.copy_((weight.float() + self.delta()).to(weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.merged_from is not None and isinstance(self.base_layer.weight, Tensor):
            self.base_layer.weight.copy_(self.merged_from)
            self.merged_from = None


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
        lr: learning rate of its own.
    """

    kind: ClassVar[str] = "lora"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    part: str = "language"
    rslora: bool = False
    lr: float | None = None

    def __post_init__(self) -> None:
        check(self.r >= 1, "lora.r", self.r, "an integer of at least 1")
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

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: A and B of each, by name."""
        trained: dict[str, nn.Parameter] = {}
        for path, linear in find_linears(model, parts, self.part, self.targets).items():
            if not isinstance(linear, nn.Linear):
                raise ModelError("M551", f"{path} is a {type(linear).__name__}, which LoRA cannot wrap.")
            layer = LoRALinear(linear, self.r, self.scale, self.dropout)
            replace_module(model, path, layer)
            trained[f"{path}.lora_A.weight"] = layer.lora_A.weight
            trained[f"{path}.lora_B.weight"] = layer.lora_B.weight
        return trained

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """adapter_config.json as `peft` reads it. Args: targets: layer paths relative to the adapter's root."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.r,
            "lora_alpha": self.numerator,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": targets,
            "bias": "none",
            "inference_mode": True,
        }


def lora_from_peft(directory: Path) -> LoRA:
    """The LoRA that a PEFT adapter folder describes; `Tuned.load` then reads its weights.

    Raises: ModelError M554 for settings that change the mathematics and that this tuner does not have.
    """
    config = json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))
    plain = {"bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None}
    for key, value in {"peft_type": "LORA", **plain}.items():
        if (config.get(key) or value) != value:
            raise ModelError("M554", f"{directory}/adapter_config.json sets {key}={config[key]!r}, which tuner lora does not have.")
    targets = config["target_modules"]
    names = targets if isinstance(targets, str) else tuple(sorted({t.rsplit(".", 1)[-1] for t in targets}))
    return LoRA(config["r"], config["lora_alpha"], config["lora_dropout"], names, rslora=bool(config.get("use_rslora")))
