"""L2-SP (arXiv:1802.01483): a pull of the tuned weights towards where they started, against forgetting.

The penalty is alpha / 2 * |w - w0|^2 over all that trains, as in the paper's equation for the weights that a model
started with. For a fully tuned tensor w0 is its value at the start of the stage. A LoRA layer's weight is
W0 + scale * B A, so its distance from the pretrained W0 is |scale * B A|, whatever A and B are by themselves.

The gradient is written down, not derived by autograd: it is added once a step, after the gradients of all
micro-batches and processes are summed, so accumulation and several processes change nothing.
Letters: r rank, A (r, d_in), B (d_out, r).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmpeft.tune import Tuned
from vlmpeft.tuners.lora_layers import LoRALinear


class Drift:
    """The penalty on what `tuned` trains now.

    Args:
        strength: the paper's alpha.

    `start` holds the starting values of fully tuned tensors, by name; a resumed run brings back those of its stage.
    """

    def __init__(self, tuned: Tuned, strength: float) -> None:
        self.tuned, self.strength = tuned, strength
        adapters = {name for path, _ in self._adapters() for name in _names(path)}
        trained = tuned.trainable().items()
        self.start: Mapping[str, Tensor] = {k: p.detach().clone() for k, p in trained if k not in adapters}

    def _adapters(self) -> list[tuple[str, LoRALinear]]:
        """LoRA layers that train now, by path."""
        trained = self.tuned.trainable()
        layers = [(path, m) for path, m in self.tuned.model.named_modules() if isinstance(m, LoRALinear)]
        return [(path, layer) for path, layer in layers if _names(path)[1] in trained]

    @torch.no_grad()
    def add_gradient(self) -> Tensor:
        """Add the penalty's gradient to that of the loss. Returns: the penalty, a scalar."""
        trained = self.tuned.trainable()
        squares: list[Tensor] = []
        for name, start in self.start.items():
            away = trained[name] - start
            _add(trained[name], away * self.strength)
            squares.append(away.square().sum())
        for _, layer in self._adapters():
            a, b = layer.factors()  # (k, d_in), (d_out, k): k = r, or 2 r with what PiSSA took off the base
            inner, outer = b.mT @ b, a @ a.mT  # (k, k): |B A|^2 = sum(inner * outer), no (d_out, d_in) product
            factor = self.strength * layer.scale**2
            r = len(layer.lora_A.weight)
            if layer.lora_A.weight.requires_grad:
                _add(layer.lora_A.weight, inner[:r] @ a * factor)
            _add(layer.lora_B.weight, b @ outer[:, :r] * factor)
            squares.append((inner * outer).sum() * layer.scale**2)
        return torch.stack(squares).sum() * (self.strength / 2)


def _names(path: str) -> tuple[str, str]:
    """Names of a LoRA layer's A and B."""
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if not parameter.requires_grad:  # it trains later, and has not moved
        return
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
