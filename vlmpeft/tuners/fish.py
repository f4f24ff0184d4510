"""FISH Mask (arXiv:2111.09839): the few weights of a part with the largest Fisher information, and no others.

Letters: k chosen entries, n entries of the part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, path_of
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.sites import roots_of
from vlmpeft.tuners.substitute import Substitute, owners
from vlmpeft.tuners.targets import replace_module

NAME = "fish_mask"  # of the module inside the part


class Mask(Attachment):
    """The chosen entries of many tensors laid end to end: where they are, and what stands there, in fp32.

    Args:
        sizes: entries of each tensor.
        count: k.
    """

    def __init__(self, sizes: Iterable[int], count: int, device: torch.device) -> None:
        super().__init__()
        self.starts = [0, *accumulate(sizes)]
        self.values = nn.Parameter(torch.zeros(count, device=device))
        self.indices = nn.Parameter(torch.full((count,), -1, device=device), requires_grad=False)  # ascending
        self.measuring = False
        self._bounds: tuple[int, list[int]] = (-1, [])  # of each tensor in `indices`, for one version of these

    @property
    def unmergeable(self) -> str:
        """See `Attachment.unmergeable`."""
        return "" if self.calibrated else "its entries are not chosen yet"

    def merge(self) -> None:
        """The modules whose entries these are merge them."""

    @property
    def calibrated(self) -> bool:
        """Whether the entries are chosen."""
        return self.bounds()[-1] > 0

    def bounds(self) -> list[int]:
        """First chosen entry of each tensor, and k at the end; read from the device once after they change."""
        version = self.indices._version
        if self._bounds[0] != version:
            starts = torch.tensor(self.starts, device=self.indices.device)
            found: list[int] = torch.searchsorted(self.indices.detach(), starts).tolist()
            chosen = bool((self.indices >= 0).all())
            self._bounds = (version, found if chosen else [0] * len(found))
        return self._bounds[1]

    def entries(self, number: int) -> tuple[Tensor, Tensor]:
        """Flat positions inside tensor `number`, and values: (k of this tensor,) both."""
        first, last = self.bounds()[number : number + 2]
        return self.indices[first:last] - self.starts[number], self.values[first:last]

    @torch.no_grad()
    def choose(self, scores: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Take the k entries with the largest scores of all tensors, and the values they have now."""
        top = torch.cat([s.flatten() for s in scores]).topk(len(self.values)).indices
        self.indices.copy_(top.sort().values)
        for number, tensor in enumerate(tensors):
            places, values = self.entries(number)
            values.copy_(tensor.flatten()[places])

    def take_out(self, model: nn.Module, path: str) -> None:
        """See `Attachment.take_out`."""
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)


class Masked(Substitute):
    """A module some entries of whose parameters are those of a mask.

    Args: first: the number that the mask gives the first of `names`.
    """

    def __init__(self, base: nn.Module, names: list[str], mask: Mask, first: int) -> None:
        super().__init__(base, names)
        self._held, self.first = (mask,), first  # in a tuple: the mask is a module of the part, not of this one
        self.train(base.training)

    @property
    def mask(self) -> Mask:
        """Where its entries are kept."""
        return self._held[0]

    def tensors(self) -> Mapping[str, Tensor]:
        """See `Substitute.tensors`. Raises: ModelError M564 in training if the entries are not chosen."""
        mask = self.mask
        if not mask.calibrated:
            if self.training and not mask.measuring:
                fix = "call calibrate(model, parts, losses) of the tuner first; the training loop does."
                raise ModelError("M564", "the entries that a fish mask trains are not chosen yet.", fix)
            return {}
        numbered = enumerate(self.replaced().items(), start=self.first)
        return {name: _filled(p, *mask.entries(number)) for number, (name, p) in numbered}


def _filled(parameter: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The parameter with values at flat places; only these get a gradient."""
    return parameter.flatten().index_put((places,), values.to(parameter.dtype)).view_as(parameter)


@TUNERS.register("fish")
@dataclass(frozen=True)
class FishMask:
    """Train the share of a part's weights that a calibration finds most informative, and keep them sparse.

    A calibration needs the memory of full gradients of the part once, and of their squares in fp32; training after it
    keeps gradients and optimizer states for the chosen entries alone, and a file holds their indices and values.

    Args:
        share: of the weights to train; the paper's 0.5 %.
        samples: whose squared gradients are averaged; the paper needs no more than this (its figure 3).
        part: "language" (its blocks) or "vision".
        lr: learning rate of its own; the default is the largest usual in full tuning (1e-6 to 5e-5).
    """

    kind: ClassVar[str] = "fish"
    share: float = 0.005
    samples: int = 128
    part: str = "language"
    lr: float | None = 5e-5

    def __post_init__(self) -> None:
        check(self.part in ("language", "vision"), "fish.part", self.part, "language or vision")
        check(0 < self.share <= 1, "fish.share", self.share, "a number in (0, 1]")
        check(self.samples >= 1, "fish.samples", self.samples, "an integer of at least 1")
        check(self.lr is None or 0 < self.lr <= 1, "fish.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Put a mask beside the part, its entries not chosen yet. Returns: their values, by name."""
        roots = [root for _, root in roots_of(model, parts, self.part)]
        found = list(owners(model, roots, lambda module, name: True))
        sizes = [module.get_parameter(name).numel() for _, module, names in found for name in names]
        device = next(found[0][1].parameters()).device
        mask = Mask(sizes, max(1, round(self.share * sum(sizes))), device)
        first = 0
        for path, module, names in found:
            replace_module(model, path, Masked(module, names, mask, first))
            first += len(names)
        part = parts.get(self.part)
        part.add_module(NAME, mask)
        return {".".join(p for p in (path_of(model, part), NAME, "values") if p): mask.values}

    def is_calibrated(self, model: nn.Module, parts: Parts) -> bool:
        """See `Calibrated.is_calibrated`."""
        return self._mask(parts).calibrated

    def calibrate(self, model: nn.Module, parts: Parts, losses: Iterable[Tensor]) -> None:
        """See `Calibrated.calibrate`: the diagonal of the empirical Fisher matrix is the mean squared gradient."""
        mask = self._mask(parts)
        masked = [m for m in model.modules() if isinstance(m, Masked) and m.mask is mask]
        tensors = [p for one in masked for p in one.replaced().values()]
        with _squared_gradients(model, mask, tensors) as sums:
            for loss in losses:
                loss.backward()
        if not any(bool(s.any()) for s in sums):
            raise ModelError("M565", "no gradient reached the weights a fish mask chooses from.", "check the data.")
        mask.choose(sums, tensors)

    def _mask(self, parts: Parts) -> Mask:
        mask = parts.get(self.part).get_submodule(NAME)
        if not isinstance(mask, Mask):
            raise TypeError(f"{NAME} is a {type(mask).__name__}")
        return mask


@contextlib.contextmanager
def _squared_gradients(model: nn.Module, mask: Mask, tensors: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Inside, each backward adds the squares of its gradients to sums, and keeps nothing else."""
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in tensors]
    trained = [p for p in model.parameters() if p.requires_grad]
    training = model.training

    def adding(total: Tensor) -> Any:
        def add(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                total.add_(gradient.float().square())

        return add

    model.eval().requires_grad_(False)
    mask.measuring = True
    for parameter in tensors:
        parameter.requires_grad_(True)
    hooks = [p.register_post_accumulate_grad_hook(adding(s)) for p, s in zip(tensors, sums, strict=True)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        mask.measuring = False
        model.train(training).requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
