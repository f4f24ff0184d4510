"""Merged adapters whose weights are learned from a few samples. Letters: n adapters, r rank, d_in d_out widths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.adapter_files import LINEAR, Adapter, Factors
from vlmpeft.adapter_merge import cat
from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, adapter_root, parts_of
from vlmpeft.tuners.linear import AdaptedLinear, chain
from vlmpeft.tuners.targets import replace_module

Batch = Mapping[str, Any]  # keyword arguments of the model's forward


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Args:
        adapter: the adapters as one, exactly.
        coefficients: by layer, (n, 1) or (n, d_in); an adapter that lacks the layer has a row that nothing uses.
        losses: one a step.
    """

    adapter: Adapter
    coefficients: Mapping[str, Tensor]
    losses: Sequence[float]


class MixedLinear(AdaptedLinear):
    """base(x) + the sum of B_i A_i (c_i * x), with c_i a number or one for every column of the update.

    Args:
        updates: of the adapters that have this layer, by their row of `coefficients`.
        coefficients: (n, 1) or (n, d_in).
    """

    def __init__(self, base: nn.Linear, updates: Mapping[int, Factors], coefficients: Tensor) -> None:
        super().__init__(base)
        self.updates, self.coefficients = updates, coefficients

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`."""
        x = self.in_own_dtype(x)
        c = self.coefficients.to(x.device)
        terms = (F.linear(F.linear(x * c[i], f.a), f.b) for i, f in self.updates.items())
        return sum(terms, out).to(out.dtype)


class Mixture:
    """Adapters on their layers in a model, each with coefficients, for as long as `placed` lasts."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter], parts: Parts | None) -> None:
        self.model, self.adapters = model, list(adapters.values())
        root = adapter_root(model, parts or parts_of(model))
        self.bases: dict[str, nn.Linear] = {}
        self.updates: dict[str, dict[int, Factors]] = {}
        for path in sorted({path for adapter in self.adapters for path in adapter.layers}):
            self.updates[path] = {i: a.layers[path] for i, a in enumerate(self.adapters) if path in a.layers}
            self.bases[path] = _linear(root, path, self.updates[path])
        self.root = root

    @contextlib.contextmanager
    def placed(self, coefficients: Mapping[str, Tensor]) -> Iterator[None]:
        """The model in eval mode with the adapters in it; as it was at the end, bit for bit."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        for path, base in self.bases.items():
            updates = {i: _on(f, base.weight.device) for i, f in self.updates[path].items()}
            replace_module(self.root, path, MixedLinear(base, updates, coefficients[path]))
        try:
            yield
        finally:
            for path, base in self.bases.items():
                replace_module(self.root, path, base)
            for module, mode in modes.items():
                module.training = mode

    def result(self, coefficients: Mapping[str, Tensor], losses: Sequence[float]) -> Learned:
        """The adapters as one, their coefficients folded in."""
        found = {path: c.detach().cpu().clone() for path, c in coefficients.items()}
        layers: dict[str, Factors] = {}
        for path, updates in self.updates.items():
            weights = found[path] if found[path].shape[1] > 1 else found[path].squeeze(1)
            layers[path] = cat([factors.scaled(weights[i]) for i, factors in updates.items()])
        first = self.adapters[0]
        return Learned(Adapter(layers, first.base, first.task), found, losses)


def _linear(root: nn.Module, path: str, updates: Mapping[int, Factors]) -> nn.Linear:
    """The layer at `path`. Raises: ModelError M580 unless it is a linear layer of the adapters' shape."""
    layer: Any = None
    with contextlib.suppress(AttributeError):
        layer = root.get_submodule(path)
    if any(m.enabled and m.slot is None for m in chain(layer) if isinstance(m, AdaptedLinear)):
        raise ModelError("M580", f"{path} has an adapter that acts.", "do this inside `with tuned.disable():`.")
    for factors in updates.values():
        shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear | AdaptedLinear) else None
        if factors.names != LINEAR or factors.shape != shape:
            message = f"{path} is no linear layer of shape {factors.shape} in this model."
            raise ModelError("M580", message, "use the model that the adapters were trained on.")
    found: nn.Linear = layer
    return found


def _on(factors: Factors, device: torch.device) -> Factors:
    return Factors(factors.a.to(device), factors.b.to(device), factors.names)


def learn_weights(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    batches: Sequence[Batch],
    *,
    scope: Literal["layer", "global"] = "layer",
    steps: int = 100,
    lr: float = 0.02,
    parts: Parts | None = None,
) -> Learned:
    """Weights that minimise the loss on a few samples (LoRA soups, arXiv:2410.13025).

    The adapters and the model stay as they are; the weights start at 1 / n.

    Args:
        batches: with labels, taken in turn, one a step of Adam.
        scope: "layer": n weights for every layer; "global": n for all of them.

    Raises: ModelError M580 for adapters that do not fit the model.
    """
    mixture = Mixture(model, adapters, parts)
    device = next(iter(mixture.bases.values())).weight.device
    start = torch.full((len(adapters), 1), 1 / len(adapters), device=device)
    leaves = [nn.Parameter(start.clone()) for _ in (mixture.bases if scope == "layer" else "1")]
    coefficients = {path: leaves[i % len(leaves)] for i, path in enumerate(mixture.bases)}
    with mixture.placed(coefficients):
        losses = _descend(leaves, lambda step: model(**batches[step % len(batches)]).loss, steps, lr)
    return mixture.result(coefficients, losses)


def zip_adapters(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, Sequence[Batch]],
    *,
    steps: int = 100,
    lr: float = 0.01,
    penalty: float = 0.01,
    parts: Parts | None = None,
) -> Learned:
    """A coefficient for every column of two updates (ZipLoRA, arXiv:2311.13600).

    On its own samples each adapter's logits are kept: the loss is their mean squared change, and penalty times the sum
    over layers of |m1 . m2|, which keeps the two off each other's columns. All start at 1.

    Args: batches: of each adapter, by its name; taken in turn.
    Raises: ModelError M580 for adapters that do not fit the model, or are not two.
    """
    if len(adapters) != 2 or batches.keys() != adapters.keys():
        raise ModelError("M580", f"{len(adapters)} adapters, samples for {sorted(batches)}.", "give two, and both's.")
    mixture = Mixture(model, adapters, parts)
    columns = {
        path: nn.Parameter(torch.ones(2, base.in_features, device=base.weight.device))
        for path, base in mixture.bases.items()
    }
    wanted = [_logits_alone(mixture, i, columns, batches[name]) for i, name in enumerate(adapters)]
    both = [columns[path] for path, updates in mixture.updates.items() if len(updates) == 2]

    def loss(step: int) -> Tensor:
        total = penalty * torch.stack([(m[0] * m[1]).sum().abs() for m in both]).sum() if both else 0
        for logits, name in zip(wanted, adapters, strict=True):
            number = step % len(logits)
            total = total + F.mse_loss(model(**batches[name][number]).logits.float(), logits[number])
        return total  # type: ignore[return-value]

    with mixture.placed(columns):
        losses = _descend(list(columns.values()), loss, steps, lr)
    return mixture.result(columns, losses)


@torch.no_grad()
def _logits_alone(mixture: Mixture, number: int, like: Mapping[str, Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    """What one adapter by itself makes the model say of its samples."""
    alone = {path: torch.zeros_like(columns) for path, columns in like.items()}
    for columns in alone.values():
        columns[number] = 1
    with mixture.placed(alone):
        return [mixture.model(**batch).logits.float() for batch in batches]


def _descend(leaves: Sequence[Tensor], loss_of: Callable[[int], Tensor], steps: int, lr: float) -> list[float]:
    """Adam on `leaves` alone: no other gradient is computed or kept. Returns: the loss before each step."""
    optimizer = torch.optim.Adam(leaves, lr=lr)
    losses: list[float] = []
    for step in range(steps):
        with torch.enable_grad():
            loss = loss_of(step)
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
            leaf.grad = gradient
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
