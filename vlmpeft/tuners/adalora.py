"""AdaLoRA (arXiv:2303.10512): updates in SVD form, whose singular values compete for a budget that all layers share.

Letters: r rank, d_in d_out widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.parts import Parts
from vlmpeft.tuners import rank_budget
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.block_choice import EVERY, Choice
from vlmpeft.tuners.linear import AdaptedLinear, Where, check_linear, wrap_linears
from vlmpeft.tuners.peft_folder import PEFT_PREFIX, check_settings, peft_settings, read_config
from vlmpeft.tuners.targets import ALL_LINEAR

EPSILON = 1e-5  # peft and the paper's code divide by r + 1e-5
STD = 0.02  # of the singular vectors' start, there too
TRIPLET = ("lora_A", "lora_E", "lora_B")
KEPT = "kept"
PATTERN = frozenset({"rank_pattern"})


class SVDLinear(AdaptedLinear):
    """base(x) + scale * B diag(E) A dropout(x), with A (r, d_in), E (r, 1), B (d_out, r) in fp32.

    E starts at zero, so that the layer starts as its base. The paper's P, Lambda and Q are B, E and A.
    """

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        options: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features, **options) * STD)
        self.lora_E = nn.Parameter(torch.zeros(r, 1, **options))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, r, **options) * STD)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scale = scale
        self.train(base.training)

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """See `AdaptedLinear.adapt`."""
        low = F.linear(self.dropout(self.in_own_dtype(x)), self.lora_A * self.lora_E)  # (..., r)
        return (out + F.linear(low, self.lora_B) * self.scale).to(out.dtype)

    def delta(self) -> Tensor:
        """scale * B diag(E) A, (d_out, d_in), fp32."""
        return self.lora_B @ (self.lora_A * self.lora_E) * self.scale

    @torch.no_grad()
    def add_orthogonality(self, weight: float) -> Tensor:
        """Add the gradient of weight * (|A A^T - I| + |B^T B - I|), Frobenius norms. Returns: the penalty, a scalar."""
        total = self.lora_A.new_zeros(())
        for parameter, rows in ((self.lora_A, self.lora_A), (self.lora_B, self.lora_B.mT)):
            off = rows @ rows.mT - torch.eye(len(rows), device=rows.device)  # (r, r)
            norm = torch.linalg.matrix_norm(off)
            gradient = 2 * weight / norm.clamp_min(torch.finfo(norm.dtype).tiny) * (off @ rows)
            gradient = gradient if parameter is rows else gradient.mT
            if parameter.requires_grad:
                parameter.grad = gradient.contiguous() if parameter.grad is None else parameter.grad.add_(gradient)
            total += weight * norm
        return total


@TUNERS.register("adalora")
@dataclass(frozen=True)
class AdaLoRA:
    """Adapters in SVD form. What a singular value and its vectors matter to the loss decides whether it stays.

    All start with `init_r` values. Between the two phases at the ends of a stage the least important of all layers go
    to zero, until `r` for each layer are left in the mean. `vlmpeft.steps.Steps` does so in any training loop.

    Args:
        r: mean rank at the end.
        init_r: rank of every layer at the start.
        alpha: numerator of the scale alpha / init_r; None is 2 init_r.
        dropout, targets, part, where, layers: as LoRA's.
        tinit, tfinal: share of the stage's steps before the budget begins to fall, and after it is down. The defaults
            are about those of the paper's experiments (its appendix).
        delta_t: steps between two decisions.
        beta1, beta2: of the averages of sensitivity and uncertainty.
        orthogonality: weight of the penalty, the mean of |P^T P - I| and |Q Q^T - I| over all layers; the paper's 0.1.
        lr: learning rate of its own; the default is the paper's for SQuAD.
    """

    kind: ClassVar[str] = "adalora"
    decays: ClassVar[bool] = False  # the singular vectors are to have unit length
    r: int = 8
    init_r: int = 12
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    part: str = "language"
    where: Where = "all"
    layers: Choice = EVERY
    tinit: float = 0.1
    tfinal: float = 0.4
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    lr: float | None = 1e-3

    def __post_init__(self) -> None:
        check_linear(self)
        check(self.r >= 1, "adalora.r", self.r, "an integer of at least 1")
        check(self.init_r >= self.r, "adalora.init_r", self.init_r, f"an integer of at least adalora.r={self.r}")
        check(self.alpha is None or self.alpha > 0, "adalora.alpha", self.alpha, "a number above 0")
        check(0 <= self.dropout < 1, "adalora.dropout", self.dropout, "a number in [0, 1)")
        check(0 <= self.tinit < 1, "adalora.tinit", self.tinit, "a share of the steps, in [0, 1)")
        check(0 <= self.tfinal < 1 - self.tinit, "adalora.tfinal", self.tfinal, "a share below 1 - adalora.tinit")
        check(self.delta_t >= 1, "adalora.delta_t", self.delta_t, "an integer of at least 1")
        check(0 < self.beta1 < 1, "adalora.beta1", self.beta1, "a number in (0, 1)")
        check(0 < self.beta2 < 1, "adalora.beta2", self.beta2, "a number in (0, 1)")
        check(self.orthogonality >= 0, "adalora.orthogonality", self.orthogonality, "a number of at least 0")
        check(self.lr is None or 0 < self.lr <= 1, "adalora.lr", self.lr, "a number in (0, 1]")

    @property
    def numerator(self) -> float:
        """alpha, with its default."""
        return 2.0 * self.init_r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """alpha / init_r, also when fewer values are left."""
        return self.numerator / (self.init_r + EPSILON)

    def resolved(self) -> AdaLoRA:
        """The same layers, whatever their schedule."""
        return AdaLoRA(1, self.init_r, self.numerator, self.dropout, self.targets, self.part, self.where, self.layers)

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the target layers. Returns: A, E and B of each, by name."""
        return wrap_linears(model, parts, self, lambda base: SVDLinear(base, self.init_r, self.scale, self.dropout))

    def add_gradients(self, layers: Mapping[str, Attachment]) -> Tensor:
        """See `Penalised`."""
        weight = self.orthogonality / (2 * len(layers))
        penalties = [cast(SVDLinear, layer).add_orthogonality(weight) for layer in layers.values()]
        return torch.stack(penalties).sum()

    def start_state(self, layers: Mapping[str, Attachment]) -> dict[str, Tensor]:
        """See `AfterStep`: sensitivity and uncertainty of every entry, and the values that are left in the end."""
        state: dict[str, Tensor] = {}
        for path, layer in layers.items():
            for name in TRIPLET:
                known = rank_budget.fresh(layer.get_parameter(name).detach())
                state |= {f"{path}.{name}|{key}": value for key, value in known.items()}
            state[f"{path}|{KEPT}"] = torch.ones_like(layer.get_parameter("lora_E"), dtype=torch.bool)
        return state

    @torch.no_grad()
    def after_step(
        self, layers: Mapping[str, Attachment], state: dict[str, Tensor], step: int, total: int
    ) -> Mapping[str, float]:
        """See `AfterStep`. Returns: the budget, how many singular values all layers may have."""
        first, last = self.phases(total)
        start, target = (rank * len(layers) for rank in (self.init_r, self.r))
        if step < last:
            for path, layer in layers.items():
                for name in TRIPLET:
                    known = _known(state, f"{path}.{name}")
                    rank_budget.observe(known, layer.get_parameter(name), (self.beta1, self.beta2))
        count = rank_budget.budget(step, first, last, start, target)
        if step == last or (first < step < last and step % self.delta_t == 0):
            self._choose(layers, state, count)
        if step >= last or (first < step and step % self.delta_t == 0):
            for path, layer in layers.items():
                layer.get_parameter("lora_E").masked_fill_(~state[f"{path}|{KEPT}"], 0.0)
        return {"budget": float(count)}

    def phases(self, total: int) -> tuple[int, int]:
        """The last step before the budget falls, and the one at which it is down: at the latest the stage's last."""
        last = min(total - 1, total - int(self.tfinal * total))
        return min(int(self.tinit * total), max(0, last - 1)), last

    def _choose(self, layers: Mapping[str, Attachment], state: dict[str, Tensor], count: int) -> None:
        scores = []
        for path in layers:
            a, e, b = (rank_budget.score(_known(state, f"{path}.{name}")) for name in TRIPLET)
            scores.append(rank_budget.triplet_scores(a, e, b))
        for path, stays in zip(layers, rank_budget.kept(scores, count), strict=True):
            state[f"{path}|{KEPT}"] = stays

    @property
    def in_peft(self) -> bool:
        """`peft` acts on every token."""
        return self.where == "all"

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`. peft demands a schedule, which counts in training alone."""
        options = {"target_r": self.r, "lora_dropout": self.dropout, "total_step": 1, "tinit": 0, "tfinal": 0}
        return peft_settings("ADALORA", self.part, base, targets, **self._settings, **options)

    @property
    def _settings(self) -> dict[str, object]:
        return {"init_r": self.init_r, "lora_alpha": self.numerator}

    def check_peft(self, folder: Path) -> None:
        """See `PeftForm.check_peft`."""
        check_settings(folder, "ADALORA", self._settings, PATTERN)

    def fill_out(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `FillsOut`: peft leaves singular values that are gone out of its files, and lists which they were."""
        pattern = read_pattern(folder) or {}
        stays = {key.removesuffix(".lora_E"): torch.tensor(value) for key, value in pattern.items()}
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            rows = stays.get(path.removeprefix(PEFT_PREFIX), stays.get(path))
            found[name] = tensor if rows is None else _filled(tensor, rows, leaf == "lora_B")
        return found


def read_pattern(folder: Path) -> dict[str, list[bool]] | None:
    """Which singular values a PEFT folder still has, by the name of the layer's E; None for all."""
    config = read_config(folder, "ADALORA", ours=PATTERN)
    pattern: dict[str, list[bool]] | None = config.get("rank_pattern")
    return pattern


def _filled(tensor: Tensor, rows: Tensor, columns: bool) -> Tensor:
    """Zeros where singular values are gone. Args: rows: (r,) bool; columns: whether they lie in columns."""
    if tensor.shape[1 if columns else 0] == len(rows):
        return tensor
    if columns:
        return _filled(tensor.mT, rows, columns=False).mT.contiguous()
    whole = tensor.new_zeros(len(rows), *tensor.shape[1:])
    whole[rows] = tensor
    return whole


def _known(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: state[f"{name}|{key}"] for key in (rank_budget.SENSITIVITY, rank_budget.UNCERTAINTY)}
