"""LoRA (arXiv:2106.09685) and its rank-stabilised scaling (arXiv:2312.03732). Letters: r rank, d_in d_out widths."""

from __future__ import annotations

import dataclasses
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
from vlmpeft.tuners.linear import AdaptedLinear, Where, check_where, wrap_linears
from vlmpeft.tuners.targets import ALL_LINEAR


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
        self.scale = scale
        self.train(base.training)  # or the dropout would act in a model that is in eval mode

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`."""
        low = self.lora_A(self.dropout(self.in_own_dtype(x)))  # (..., r)
        if low.dtype == out.dtype:  # one product that adds into the output: no (..., d_out) tensor of its own
            rows, low = out.reshape(-1, out.shape[-1]), low.reshape(-1, low.shape[-1])
            return torch.addmm(rows, low, self.lora_B.weight.T, alpha=self.scale).view(out.shape)
        return (out + self.lora_B(low) * self.scale).to(out.dtype)

    def delta(self) -> Tensor:
        """The weight update scale * B A, (d_out, d_in), fp32."""
        return (self.lora_B.weight @ self.lora_A.weight) * self.scale


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
        lr: learning rate of its own.
    """

    kind: ClassVar[str] = "lora"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    part: str = "language"
    rslora: bool = False
    where: Where = "all"
    lr: float | None = None

    def __post_init__(self) -> None:
        check_where(self)
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

    def resolved(self) -> LoRA:
        """The same tuner with alpha written out, so that equal adapters compare equal."""
        return dataclasses.replace(self, alpha=self.numerator)

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: A and B of each, by name."""
        return wrap_linears(model, parts, self, lambda base: LoRALinear(base, self.r, self.scale, self.dropout))

    @property
    def in_peft(self) -> bool:
        """`peft` acts on every token."""
        return self.where == "all"

    def check_peft(self, folder: Path) -> None:
        """Raise unless an adapter folder was trained with this rank and scale: equal shapes do not tell."""
        config = read_adapter_config(folder)
        found = (config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora")))
        if found != (self.r, self.numerator, self.rslora):
            ours = f"{self.r}, {self.numerator:g}, {self.rslora}"
            theirs = f"{folder} has r, alpha, rslora = {found[0]}, {found[1]:g}, {found[2]}"
            fix = "apply the tuner it was trained with, or lora_from_peft(directory)."
            raise ModelError("M502", f"{theirs}; the tuner here has {ours}.", fix)

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if self.part in ("language", "lm_head") else None,
            "base_model_name_or_path": base,
            "r": self.r,
            "lora_alpha": self.numerator,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": targets,
            "bias": "none",
            "inference_mode": True,
        }


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
    """adapter_config.json of a PEFT folder that describes plain LoRA.

    Raises: ModelError M502 if it is missing or damaged, M554 for settings that change the mathematics.
    """
    path = directory / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError("M502", f"{path} cannot be read: {error}.", "check the directory.") from error
    if not isinstance(config, dict) or not all(isinstance(config.get(k), int | float) for k in ("r", "lora_alpha")):
        raise ModelError("M502", f"{path} gives no numbers r and lora_alpha.", "check the directory.")
    if config.get("peft_type") != "LORA":
        raise ModelError("M554", f"{path} describes {config.get('peft_type')!r}, not LORA.")
    for key in _NOT_OURS:
        if config.get(key) and config[key] != "none":
            raise ModelError("M554", f"{path} sets {key}={config[key]!r}, which tuner lora does not have.")
    return config


_NOT_OURS = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "fan_in_fan_out", "kasa_config",
    "layer_replication", "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
"""Keys of peft's LoraConfig that change what the adapter computes or what its file holds."""
