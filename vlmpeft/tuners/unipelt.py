"""UniPELT (arXiv:2110.07577): LoRA, prefix and bottleneck adapter together, each as much as a learned gate says.

The paper's encoder averages each gate over the sequence. A decoder that answers token by token cannot know that
average, so here every token has gates of its own: sigmoid(w x + b) of what the gated module gets at that token.
Letters: b batch, s sequence, d width, r rank, n virtual tokens, l blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts
from vlmpeft.tuners.base import TUNERS, check, check_part
from vlmpeft.tuners.block_choice import EVERY, Choice
from vlmpeft.tuners.bottleneck_layers import Activation, Bottleneck, wrap_sites
from vlmpeft.tuners.deep_prefix import DeepPrefix, PlainPrefix, ProjectedPrefix, key_shape, self_attention
from vlmpeft.tuners.gated_attention import GATE, can_gate, put_gate, take_gate
from vlmpeft.tuners.linear import Where, wrap_linears
from vlmpeft.tuners.lora_layers import LoRALinear
from vlmpeft.tuners.sites import MLP, Site
from vlmpeft.tuners.virtual import decoder_with

NAME = "unipelt"  # of the prefix inside the language model, and of the tuner


def gate_for(width: int, device: torch.device) -> nn.Linear:
    """(..., d) -> (..., 1), before its sigmoid; drawn as nn.Linear is, so that gates start around a half."""
    return nn.Linear(width, 1, device=device, dtype=torch.float32)


class GatedLoRA(LoRALinear):
    """base(x) + scale * g(x) * B A dropout(x)."""

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__(base, r, scale, dropout)
        self.gate = gate_for(base.in_features, base.weight.device)

    @property
    def unmergeable(self) -> str:
        """See `Attachment.unmergeable`."""
        return "its gate looks at every token"

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`."""
        x = self.in_own_dtype(x)
        low = self.lora_A(self.dropout(x)) * torch.sigmoid(self.gate(x))  # (..., r)
        return (out + self.lora_B(low) * self.scale).to(out.dtype)


class GatedBottleneck(Bottleneck):
    """h + g(x) * update(h) on the output h of a module with input x."""

    def __init__(self, base: nn.Module, width: int, dim: int, activation: Activation) -> None:
        super().__init__(base, width, dim, activation)
        self.gate = gate_for(width, self.down.weight.device)

    def update(self, hidden: Tensor, given: Any) -> Tensor:
        """See `Bottleneck.update`."""
        return torch.sigmoid(self.gate(given.float())) * super().update(hidden, given)


class GatedPrefix(DeepPrefix):
    """A prefix whose keys and values count for every query of a block as much as g(x) says, x being its input there."""

    def __init__(self, prefix: PlainPrefix | ProjectedPrefix, width: int, parts: Parts) -> None:
        self._refuse(parts)
        super().__init__(prefix, parts)
        device = next(parts.blocks[0].parameters()).device
        self.gates = nn.ModuleList(gate_for(width, device) for _ in parts.blocks)
        self._gated = [self_attention(block)[0] for block in parts.blocks]
        for attention in self._gated:
            put_gate(attention)

    @staticmethod
    def _refuse(parts: Parts) -> None:
        for block in parts.blocks:
            attention = self_attention(block)[0]
            if not can_gate(attention):
                message = f"a {type(attention).__name__} computes attention by itself, so no gate fits."
                raise ModelError("M567", message, "use lora, bottleneck and prefix_tuning side by side.")

    def _inject(self, block: int, cache: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """See `DeepPrefix._inject`; the gates go to the attention as one argument more."""
        if not self.enabled:
            return None
        given, named = super()._inject(block, cache, module, args, kwargs)
        hidden: Tensor = given[0] if given else named["hidden_states"]
        gate = torch.sigmoid(self.gates[block](hidden.float()))  # (b, s, 1)
        return given, named | {GATE: (self.deep, gate)}

    def take_out(self, model: nn.Module, path: str) -> None:
        """See `Attachment.take_out`."""
        for attention in self._gated:
            take_gate(attention)
        super().take_out(model, path)


@TUNERS.register(NAME)
@dataclass(frozen=True)
class UniPELT:
    """Gated LoRA, a gated prefix and a gated bottleneck adapter behind every MLP. Prompt tuning goes beside it.

    Args:
        r, alpha, dropout, targets: of the LoRA; the paper's is of rank 8 on queries and values.
        tokens: n of the prefix; hidden: of the MLP that makes it, None for none; the paper's 10 and 512.
        dim: bottleneck of the adapter; None is d / 16, as in the paper.
        activation: of the adapter.
        part: "language".
        lr: learning rate of its own; the default is the paper's.
    """

    kind: ClassVar[str] = NAME
    where: ClassVar[Where] = "all"
    layers: ClassVar[Choice] = EVERY
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "minimal"
    tokens: int = 10
    hidden: int | None = 512
    dim: int | None = None
    activation: Activation = "relu"
    part: str = "language"
    lr: float | None = 5e-4

    def __post_init__(self) -> None:
        check_part(self.part, f"{NAME}.part")
        check(self.part == "language", f"{NAME}.part", self.part, "language, whose blocks get the prefix")
        for key in ("r", "tokens"):
            value = self.r if key == "r" else self.tokens
            check(value >= 1, f"{NAME}.{key}", value, "an integer of at least 1")
        for key, width in (("hidden", self.hidden), ("dim", self.dim)):
            check(width is None or width >= 1, f"{NAME}.{key}", width, "at least 1, or null")
        check(self.alpha is None or self.alpha > 0, f"{NAME}.alpha", self.alpha, "a number above 0")
        check(0 <= self.dropout < 1, f"{NAME}.dropout", self.dropout, "a number in [0, 1)")
        check(self.lr is None or 0 < self.lr <= 1, f"{NAME}.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Put all three into the blocks. Returns: their parameters, by name. Raises: ModelError M550-M552, M567."""
        shape = key_shape(parts)
        plain = self.hidden is None
        prefix = PlainPrefix(self.tokens, *shape) if plain else ProjectedPrefix(self.tokens, *shape, self.hidden or 0)
        scale = (2.0 * self.r if self.alpha is None else self.alpha) / self.r
        trained = wrap_linears(model, parts, self, lambda base: GatedLoRA(base, self.r, scale, self.dropout))
        trained |= wrap_sites(model, parts, self, MLP, self._adapter)
        width = int(cast(Any, decoder_with(parts)).config.hidden_size)
        return trained | GatedPrefix(prefix, width, parts).put_into(model, parts, NAME)

    def _adapter(self, site: Site) -> GatedBottleneck:
        return GatedBottleneck(site.module, site.width, self.dim or max(1, site.width // 16), self.activation)


def parameter_count(blocks: int, d: int, r: int, linears: int, tokens: int, hidden: int | None, dim: int) -> int:
    """Numbers that it trains where all widths are d. Args: linears: with LoRA, in each block."""
    lora = linears * (2 * r * d + d + 1)
    adapter = 2 * d * dim + dim + d + d + 1
    keys = tokens * 2 * d if hidden is None else hidden * 2 * d + 2 * d
    maker = 0 if hidden is None else tokens * d + d * hidden + hidden
    return blocks * (lora + adapter + keys + d + 1) + maker
