"""Parameter groups, one or two a tuner, the learning-rate schedule, and the optimizer: torch's AdamW or bitsandbytes'.

bitsandbytes keeps the moments in 8 bits (arXiv:2110.02861), or in memory that CUDA moves between GPU and host (paged).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmpeft.quant import bitsandbytes_for
from vlmpeft.recipe import OptimConfig
from vlmpeft.tune import Tuned
from vlmpeft.tuners.base import DoesNotDecay, HasLrFactors, Tuner

Schedule = Literal["cosine", "linear", "constant"]
PAGED = "paged_"
MOMENTS = ("state1", "state2")  # what bitsandbytes calls AdamW's two


def lr_factor(step: int, total: int, warmup_ratio: float, schedule: Schedule) -> float:
    """Factor on the learning rate of optimizer step `step` (from 0).

    Rises linearly over ceil(warmup_ratio * total) steps from 0, then falls to 0 at `total`, as
    transformers' get_cosine_schedule_with_warmup. Source of the cosine: arXiv:1608.03983 eq. 5.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return step / warmup
    if schedule == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    done = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))) if schedule == "cosine" else 1.0


def parameter_groups(tuned: Tuned, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the optimizer: per tuner its learning rate; biases and one-dimensional tensors (norms) do not decay.

    Returns: groups with "name", "peak_lr", "lr", "weight_decay", "params" and "parameter_names", each trainable once.
    """
    groups: list[dict[str, Any]] = []
    for name, parameters in tuned.claims().items():
        tuner = tuned.applied[name].tuner
        peak, factors = tuner.lr or lr, _lr_factors(tuner, parameters)
        for factor in sorted(set(factors.values())):
            label = name if factor == 1 else f"{name} x{factor:g}"
            for decays in (True, False):
                alike = {k for k, p in parameters.items() if _decays(tuner, p) is decays and factors[k] == factor}
                chosen = {k: p for k, p in parameters.items() if k in alike}
                if chosen:
                    groups.append(_group(label, peak * factor, weight_decay if decays else 0.0, chosen))
    return groups


def _decays(tuner: Tuner, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not isinstance(tuner, DoesNotDecay)


def _lr_factors(tuner: Tuner, names: Iterable[str]) -> dict[str, float]:
    """How many times the tuner's learning rate each parameter has."""
    found = dict.fromkeys(names, 1.0)
    return found | dict(tuner.lr_factors(found)) if isinstance(tuner, HasLrFactors) else found


def _group(name: str, peak: float, decay: float, chosen: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    return {
        "name": name,
        "peak_lr": peak,
        "lr": 0.0,
        "weight_decay": decay,
        "params": list(chosen.values()),
        "parameter_names": list(chosen),
    }


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """torch's AdamW on these groups."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)


def check_optimizer(name: str) -> Any:
    """bitsandbytes, if the optimizer of this name is from there. Raises: EnvironmentFault E410."""
    return None if name == "adamw" else bitsandbytes_for(f"optim.name={name}", "set optim.name=adamw")


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a recipe; a paged one keeps its moments in ordinary memory where there is no CUDA.

    Tensors of less than 4096 elements have moments of 32 bits in any of them.
    Raises: EnvironmentFault E410.
    """
    bitsandbytes = check_optimizer(config.name)
    if bitsandbytes is None:
        return adamw(groups, config.betas, config.eps)
    kind = bitsandbytes.optim.AdamW8bit if config.name.endswith("8bit") else bitsandbytes.optim.AdamW32bit
    paged = config.name.startswith(PAGED) and device.type == "cuda"
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.0, betas=config.betas, eps=config.eps, is_paged=paged)
    return optimizer


def optimizer_note(name: str, device: str) -> str | None:
    """What a run on a type of device says of an optimizer that is not quite what its name promises."""
    if not name.startswith(PAGED) or device == "cuda":
        return None
    return f"optim.name={name}: no CUDA here to page with, so {name.removeprefix(PAGED)} without paging"


def restored(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, entry: str, saved: Tensor) -> Tensor | int:
    """An entry of the optimizer's state as the optimizer keeps it, from a checkpoint's tensor on its device."""
    if saved.ndim == 0 and not saved.is_floating_point():
        return int(saved.item())  # bitsandbytes counts steps in an int; in a tensor beta ** step would be in fp32
    if entry in MOMENTS and getattr(optimizer, "is_paged", False):
        buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=saved.dtype)  # type: ignore[attr-defined]
        return buffer.copy_(saved)
    return saved


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give every group its peak times `factor`. Returns: learning rate by tuner."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
