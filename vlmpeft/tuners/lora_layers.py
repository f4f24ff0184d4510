"""The layers of LoRA: plain, and with starts of their own. Letters: r rank, d_in d_out widths."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.quant_anew import packed, put_packed, requantise, take_original
from vlmpeft.quant_weight import plain_weight
from vlmpeft.tuners.linear import AdaptedLinear, chain
from vlmpeft.tuners.lora_init import principal


def fresh_pair(base: nn.Linear, r: int) -> tuple[nn.Linear, nn.Linear]:
    """A (r, d_in) and B (d_out, r) in fp32, whose product starts at zero.

    Initialised as loralib does (loralib/layers.py:119): A Kaiming-uniform with a = sqrt(5), B zero.
    """
    device = base.weight.device
    a = nn.Linear(base.in_features, r, bias=False, device=device, dtype=torch.float32)
    b = nn.Linear(r, base.out_features, bias=False, device=device, dtype=torch.float32)
    nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    return a, b


class LoRALinear(AdaptedLinear):
    """base(x) + scale * B A dropout(x), with A (r, d_in), B (d_out, r) in fp32 on a base of any dtype."""

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.lora_A, self.lora_B = fresh_pair(base, r)
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

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, d_in) and B (d_out, k) whose product, times the scale, is the weight update; here k = r."""
        return self.lora_A.weight, self.lora_B.weight

    def delta(self) -> Tensor:
        """The weight update scale * B A, (d_out, d_in), fp32."""
        a, b = self.factors()
        return (b @ a) * self.scale


class StartedLoRA(LoRALinear):
    """LoRA away from zero, whose update of the original weight is scale * (B A - B0 A0).

    The frozen start A0 (r, d_in), B0 (d_out, r) is saved with it. Args: a, b: the start.
    """

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float, a: Tensor, b: Tensor) -> None:
        super().__init__(base, r, scale, dropout)
        self.start_A, self.start_B = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        with torch.no_grad():
            self.lora_A.weight.copy_(a)
            self.lora_B.weight.copy_(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `LoRALinear.factors`; here k = 2 r."""
        return torch.cat([self.lora_A.weight, self.start_A]), torch.cat([self.lora_B.weight, -self.start_B], 1)


class PiSSALinear(StartedLoRA):
    """LoRA that starts at the base's principal part (arXiv:2404.02948): (W - scale B0 A0)(x) + scale * B A dropout(x).

    W - scale B0 A0 is never written down: its two terms are applied one after the other, and the first are the frozen
    base's. So nothing is rounded, the layer starts as its base bit for bit, and the base stays as it is.
    """

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__(base, r, scale, dropout, *principal(plain_weight(base), r, scale))

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`."""
        x = self.in_own_dtype(x)
        before = F.linear(F.linear(x, self.start_A), self.start_B)
        return (out + (self.lora_B(self.lora_A(self.dropout(x))) - before) * self.scale).to(out.dtype)


class LoftQLinear(StartedLoRA):
    """LoRA that starts at what quantisation took (arXiv:2310.08659): Q(x) + scale * B A dropout(x) is nearest W(x).

    Q is the quantised base and W what it was: scale * B0 A0 is the best rank-r part of W - Q. More than one iteration
    quantises W - scale * B A anew, and the base is that until the adapter is taken out.
    """

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float, iterations: int) -> None:
        plain = list(chain(base))[-1]
        original, before = take_original(plain), packed(plain) if iterations > 1 else None
        start = residual(original.to(base.weight.device), plain, r, scale, iterations)
        super().__init__(base, r, scale, dropout, *start)
        self.packed_before = before

    def take_out(self, model: nn.Module, path: str) -> None:
        """See `AdaptedLinear.take_out`."""
        if self.packed_before is not None:
            put_packed(list(chain(self))[-1], *self.packed_before)
        super().take_out(model, path)


@torch.no_grad()
def residual(original: Tensor, layer: nn.Module, r: int, scale: float, iterations: int) -> tuple[Tensor, Tensor]:
    """LoftQ's algorithm 1: quantise what the factors leave, and let the factors stand for what quantisation leaves.

    Args: original (d_out, d_in): W. layer: quantised from W; what it holds changes with the second iteration.
    Returns: A (r, d_in), B (d_out, r) in fp32, scale * B A being the best rank-r part of W - Q.
    """
    weight = original.float()
    a, b = principal(weight - plain_weight(layer).float(), r, scale)
    for _ in range(iterations - 1):
        now = requantise(layer, weight - scale * b @ a)
        a, b = principal(weight - now.float(), r, scale)
    return a, b
