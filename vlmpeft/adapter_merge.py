"""Several LoRAs as one, by arithmetic on their true updates scale * B A.

`peft`'s "linear" adds the As and the Bs apart, so that their product has cross terms B_i A_j; ours is the weighted sum.
Letters: n adapters, r rank, d_in d_out widths.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmpeft.adapter_files import Adapter, Factors
from vlmpeft.errors import ConfigError, ModelError, nearest

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]
EXACT = ("linear", "cat")
SPARSE = ("ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class MergePlan:
    """How adapters become one.

    Args:
        weights: one for each adapter.
        method: "linear" or "cat": the weighted sum, exactly, its rank the sum of ranks. "svd": its best approximation
            of rank r. "ties" (arXiv:2306.01708), "dare_linear" and "dare_ties" (arXiv:2311.03099): see the functions.
        density: share of an update's entries that ties and dare keep, in (0, 1].
        r: rank of the result; None for the largest rank (svd), or the sum of ranks; "full" for no approximation.
        seed: of what dare drops.
    """

    weights: tuple[float, ...]
    method: Method = "linear"
    density: float = 1.0
    r: int | Literal["full"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError("C102", f"method={self.method}: no such method{nearest(self.method, get_args(Method))}")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ConfigError("C102", f"weights={list(self.weights)} are not all finite.")
        if not 0 < self.density <= 1:
            raise ConfigError("C102", f"density={self.density:g} is out of range.", "use a number in (0, 1].")
        if self.density < 1 and self.method not in SPARSE:
            raise ConfigError("C102", f"method={self.method} keeps every entry.", "leave density out, or use ties.")
        if self.r is not None and self.method in EXACT:
            raise ConfigError("C102", f"method={self.method} keeps every rank.", "leave r out, or use method=svd.")
        if isinstance(self.r, int) and self.r < 1:
            raise ConfigError("C102", f"r={self.r} is out of range.", "use an integer of at least 1, or full.")


@dataclass(frozen=True)
class Merged:
    """The result, and by layer how far it is from the update it stands for.

    Args: errors: Frobenius norm of the difference; norms: of the update itself.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    norms: Mapping[str, float]

    def relative(self, path: str) -> float:
        """Relative error of one layer."""
        return self.errors[path] / self.norms[path] if self.norms[path] else 0.0

    @property
    def overall(self) -> float:
        """Relative error of all layers together."""
        norm = math.hypot(*self.norms.values())
        return math.hypot(*self.errors.values()) / norm if norm else 0.0


def merge(adapters: Mapping[str, Adapter], plan: MergePlan, device: torch.device | str = "cpu") -> Merged:
    """Adapters, by name, as one; a layer that some of them lack has an update of zero there.

    Args: device: where the products and decompositions of ties and dare are computed.
    Raises: ConfigError C102 for another number of weights; ModelError M580 for layers of different shapes.
    """
    if len(plan.weights) != len(adapters):
        counts = f"{len(plan.weights)} weights for {len(adapters)} adapters."
        raise ConfigError("C102", counts, "give one weight for each adapter.")
    layers: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for path in sorted({path for adapter in adapters.values() for path in adapter.layers}):
        weighted = zip(adapters.items(), plan.weights, strict=True)
        here = [(name, adapter.layers[path], w) for (name, adapter), w in weighted if path in adapter.layers]
        _check_shapes(path, {name: factors for name, factors, _ in here})
        layers[path], errors[path], norms[path] = _merge_layer(path, here, plan, torch.device(device))
    return Merged(_described(adapters, layers), errors, norms)


def _check_shapes(path: str, factors: Mapping[str, Factors]) -> None:
    if len({(f.shape, f.names) for f in factors.values()}) > 1:
        shapes = ", ".join(f"{name} {f.shape}" for name, f in factors.items())
        raise ModelError("M580", f"{path} differs in shape: {shapes}.", "merge adapters of one base model.")


def _described(adapters: Mapping[str, Adapter], layers: Mapping[str, Factors]) -> Adapter:
    """The layers with what all adapters say of their base and task."""
    bases, tasks = {a.base for a in adapters.values()}, {a.task for a in adapters.values()}
    return Adapter(layers, bases.pop() if len(bases) == 1 else "", tasks.pop() if len(tasks) == 1 else None)


def _merge_layer(
    path: str, here: Sequence[tuple[str, Factors, float]], plan: MergePlan, device: torch.device
) -> tuple[Factors, float, float]:
    """One layer's update, its error and the norm of what it stands for."""
    exact = cat([factors.scaled(weight) for _, factors, weight in here])
    if plan.method in EXACT:
        return exact, 0.0, exact.norm()
    full = min(exact.shape)
    default = max(f.r for _, f, _ in here) if plan.method == "svd" else exact.r
    r = min(full, full if plan.r == "full" else plan.r or default)
    if plan.method == "svd":
        return truncate(exact, r)
    deltas = [f.scaled(weight).delta().to(device) for _, f, weight in here]
    if plan.method != "ties":
        names = [f"{plan.seed}/{name}/{path}" for name, _, _ in here]
        deltas = [drop(delta, plan.density, name) for delta, name in zip(deltas, names, strict=True)]
    elif plan.density < 1:
        deltas = [trim(delta, plan.density) for delta in deltas]
    merged = sum(deltas[1:], deltas[0]) if plan.method == "dare_linear" else elect(torch.stack(deltas))
    return decompose(merged, r, exact.names)


def cat(factors: Sequence[Factors]) -> Factors:
    """The sum of updates, exactly: A on A, B beside B."""
    a, b = torch.cat([f.a for f in factors]), torch.cat([f.b for f in factors], 1)
    return Factors(a, b, factors[0].names)


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the entries of largest magnitude, int(density * all) of them; the others become zero."""
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    return torch.zeros_like(delta).flatten().index_copy(0, kept, delta.flatten()[kept]).view_as(delta)


def drop(delta: Tensor, density: float, name: str) -> Tensor:
    """Keep every entry with probability `density`, divided by it: the mean is the update itself.

    Args: name: of the tensor, with the seed; what is kept depends on nothing else, on any device.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    chances = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(chances.to(delta.device) < density, delta / density, 0)


def elect(deltas: Tensor) -> Tensor:
    """Per entry the sign with the larger mass, and the mean of those of that sign alone; zeros take no part.

    Args: deltas: (n, ...), weights folded in. Source: arXiv:2306.01708 section 4, its lambda the common weight.
    """
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = deltas.sign() == sign
    return (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)


def truncate(factors: Factors, r: int) -> tuple[Factors, float, float]:
    """The best approximation of rank `r` of B A, never written out: QR of both sides, SVD of the small middle.

    Returns: the factors, the Frobenius norm of what is lost, and of B A.
    """
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    return _split(torch.linalg.svd(r_b @ r_a.T, full_matrices=False), r, factors.names, q_b, q_a)


def decompose(delta: Tensor, r: int, names: tuple[str, str]) -> tuple[Factors, float, float]:
    """As `truncate`, of an update (d_out, d_in) that has no factors."""
    return _split(torch.linalg.svd(delta, full_matrices=False), r, names)


def _split(
    svd: tuple[Tensor, Tensor, Tensor],
    r: int,
    names: tuple[str, str],
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> tuple[Factors, float, float]:
    """Factors of the r largest singular values, halved between them, with the norms of the rest and of all.

    Args: left, right: what the singular vectors are coordinates in, if not the layer's own axes.
    """
    u, s, vh = svd
    root = s[:r].sqrt()
    b, a = u[:, :r] * root, root[:, None] * vh[:r]
    b, a = b if left is None else left @ b, a if right is None else a @ right.T
    return Factors(a.float().cpu(), b.float().cpu(), names), float(s[r:].norm()), float(s.norm())
