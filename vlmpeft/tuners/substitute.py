"""Modules that run with tensors of a tuner's own in the place of some of their parameters, which stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vlmpeft.errors import ModelError
from vlmpeft.parts import path_of
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.targets import is_linear, replace_module


class Substitute(Attachment):
    """A module that is run with `tensors()` in the place of its parameters of these names.

    What it computes with has the dtype of the parameters it stands for, so a bf16 model stays one outside autocast.
    """

    def __init__(self, base: nn.Module, names: Collection[str]) -> None:
        super().__init__()
        self.base_layer, self.names = base, tuple(names)
        self.wraps_linear = is_linear(base)
        self.merged_from: dict[str, Tensor] | None = None  # the base's parameters as they were before `merge`

    def tensors(self) -> Mapping[str, Tensor]:
        """By the parameter's name below the base; a name that is left out keeps the base's."""
        raise NotImplementedError

    def replaced(self) -> dict[str, nn.Parameter]:
        """The base's parameters that others stand for."""
        return {name: self.base_layer.get_parameter(name) for name in self.names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base gives, with the tensors in place."""
        if not self.enabled or self.merged:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, dict(self.tensors()), args, kwargs)

    @property
    def merged(self) -> bool:
        """Whether the base holds the tensors."""
        return self.merged_from is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Write the tensors into the base; `unmerge` brings back the old ones bit for bit."""
        if self.merged_from is None:
            self.merged_from = {name: p.detach().clone() for name, p in self.replaced().items()}
            for name, value in self.tensors().items():
                self.replaced()[name].copy_(value)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`."""
        for name, value in (self.merged_from or {}).items():
            self.replaced()[name].copy_(value)
        self.merged_from = None

    def settle(self) -> None:
        """Merge for good: the old parameters are forgotten."""
        self.merge()
        self.merged_from = None

    def take_out(self, model: nn.Module, path: str) -> None:
        """Put the base back in its place."""
        self.unmerge()
        replace_module(model, path, self.base_layer)

    @property
    def weight(self) -> Tensor:
        """The base's weight: what an adapter around this one, and code that asks for a layer's dtype, looks at."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias a linear layer adds: the tensor that stands for it, if one does."""
        base: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return base if self.merged or not self.enabled else self.tensors().get("bias", base)

    @property
    def in_features(self) -> int:
        """Of a linear layer."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Of a linear layer."""
        return int(self.weight.shape[0])


class Retrained(Substitute):
    """A module run with fp32 copies of some of its parameters, which train in their stead."""

    def __init__(self, base: nn.Module, names: Collection[str]) -> None:
        super().__init__(base, names)
        copies = {n.replace(".", "_"): p.detach().to(torch.float32, copy=True) for n, p in self.replaced().items()}
        self.trained = nn.ParameterDict({key: nn.Parameter(value) for key, value in copies.items()})
        self.train(base.training)

    def tensors(self) -> Mapping[str, Tensor]:
        """See `Substitute.tensors`."""
        return {name: self.trained[name.replace(".", "_")].to(p.dtype) for name, p in self.replaced().items()}


Choice = Callable[[nn.Module, str], bool]  # a module and the name of a parameter of its own -> whether to take it


def owners(model: nn.Module, roots: Iterable[nn.Module], choice: Choice) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """The modules below `roots` that hold chosen parameters themselves, adapters' aside: path, module, their names.

    torch's MultiheadAttention reads its output layer's weights without calling it, and so counts as their holder.
    Raises: ModelError M551 for a part that is one such module, M552 where another tuner stands for them already.
    """
    attached = [m for m in model.modules() if isinstance(m, Attachment)]
    foreign = {id(p) for one in attached for p in one.own_parameters().values()}
    taken = {id(one.base_layer) for one in attached if isinstance(one, Substitute)}
    done: set[int] = set()
    for root in roots:
        prefix = path_of(model, root)
        for name, module in root.named_modules():
            whole = isinstance(module, nn.MultiheadAttention)
            mine = {n: p for n, p in module.named_parameters(recurse=whole) if id(p) not in foreign | done}
            chosen = [n for n in mine if choice(module, n)]
            done |= {id(mine[n]) for n in chosen}
            path = ".".join(p for p in (prefix, name) if p)
            if chosen and not name:
                message = f"{path} holds weights itself, not in layers below it."
                raise ModelError("M551", message, "tune it with a tuner of kind full.")
            if not all(mine[n].is_floating_point() for n in chosen):
                raise ModelError("M551", f"{path} is quantised: its weights cannot train.", "use a tuner of kind lora.")
            if chosen and id(module) in taken:
                fix = "use one of the two tuners."
                raise ModelError("M552", f"another tuner trains weights of {path.removesuffix('.base_layer')}.", fix)
            if chosen:
                yield path, module, chosen


def retrain(model: nn.Module, roots: Iterable[nn.Module], choice: Choice) -> dict[str, nn.Parameter]:
    """Make `Retrained` of the modules with chosen parameters. Returns: the copies by name. Raises: as `owners`."""
    trained: dict[str, nn.Parameter] = {}
    for path, module, names in list(owners(model, roots, choice)):
        layer = Retrained(module, names)
        replace_module(model, path, layer)
        trained |= {f"{path}.{name}": p for name, p in layer.own_parameters().items()}
    return trained
