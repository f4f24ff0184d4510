"""Ranks and scales of the layers of a low-rank tuner, some of them of their own, and `peft`'s patterns for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlmpeft.errors import ModelError, nearest
from vlmpeft.tuners.base import check

PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})


def last_name(path: str) -> str:
    """What a layer is called in its block."""
    return path.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Ranks:
    """Ranks and scales by layer.

    Args:
        kind: the tuner's, for messages.
        r: rank of the layers that `ranks` does not name.
        alpha: numerator of the scale; None is twice a layer's rank.
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        ranks: other ranks, by the last name of a layer.
        doubled: whether a file holds twice the rank, and an alpha that then means the same scale.
    """

    kind: str
    r: int
    alpha: float | None
    rslora: bool = False
    ranks: Mapping[str, int] | None = None
    doubled: bool = False

    def check(self) -> None:
        """Raise ConfigError C102 for what no layer can have."""
        check(self.r >= 1, f"{self.kind}.r", self.r, "an integer of at least 1")
        check(self.alpha is None or self.alpha > 0, f"{self.kind}.alpha", self.alpha, "a number above 0")
        for r in (self.ranks or {}).values():
            whole = isinstance(r, int) and not isinstance(r, bool) and r >= 1
            check(whole, f"{self.kind}.ranks", dict(self.ranks or {}), "integers of at least 1 by name")

    def every(self) -> tuple[int, ...]:
        """All ranks there are."""
        return (self.r, *(self.ranks or {}).values())

    def of(self, path: str) -> int:
        """Rank of a layer."""
        return (self.ranks or {}).get(last_name(path), self.r)

    def numerator(self, r: int) -> float:
        """alpha of a layer of rank `r`."""
        return 2.0 * r if self.alpha is None else self.alpha

    def scale(self, r: int) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return self.numerator(r) / (math.sqrt(r) if self.rslora else r)

    def by_layer(self, layers: Mapping[str, nn.Module]) -> dict[int, int]:
        """Ranks by id of the layer. Raises: ModelError M550 for one given for a layer that is not a target."""
        known = {last_name(path) for path in layers}
        for name in self.ranks or {}:
            if name not in known:
                message = f"{self.kind}.ranks names '{name}', which is not among the targets{nearest(name, known)}"
                raise ModelError("M550", message, "name target layers exactly.")
        return {id(layer): self.of(path) for path, layer in layers.items()}

    def written(self, r: int) -> tuple[int, float]:
        """Rank and alpha in a file."""
        if not self.doubled:
            return r, self.numerator(r)
        return 2 * r, self.numerator(r) * (math.sqrt(2) if self.rslora else 2)

    def settings(self, targets: Iterable[str]) -> dict[str, Any]:
        """The keys of an adapter_config.json. Args: targets: paths of the adapted layers."""
        r, alpha = self.written(self.r)
        return {
            "r": r,
            "lora_alpha": alpha,
            "use_rslora": self.rslora,
            **(self._patterns(targets) if self.ranks else {}),
        }

    def _patterns(self, paths: Iterable[str]) -> dict[str, dict[str, float]]:
        written = {path: self.written(self.of(path)) for path in paths if self.of(path) != self.r}
        alphas = {path: alpha for path, (_, alpha) in written.items() if alpha != self.written(self.r)[1]}
        return {"rank_pattern": {path: r for path, (r, _) in written.items()}, "alpha_pattern": alphas}

    def check_folder(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raise ModelError M502 unless a folder has these ranks and scales: equal shapes do not tell."""
        found = (config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora")))
        r, alpha = self.written(self.r)
        if found != (r, alpha, self.rslora):
            ours = f"{r}, {alpha:g}, {self.rslora}"
            theirs = f"{folder} has r, alpha, rslora = {found[0]}, {found[1]:g}, {found[2]}"
            fix = "apply the tuner it was trained with; lora_from_peft(directory) makes that of a plain LoRA."
            raise ModelError("M502", f"{theirs}; the tuner here has {ours}.", fix)
        for pattern, expected in self._patterns(self.ranks or {}).items():
            by_name = {last_name(path): value for path, value in (config.get(pattern) or {}).items()}
            if by_name != expected:
                message = f"{folder} has {pattern}={by_name}; the tuner here has {expected}."
                raise ModelError("M502", message, "apply the tuner it was trained with.")


def read_ranks(folder: Path, config: Mapping[str, Any]) -> tuple[float | None, dict[str, int] | None]:
    """alpha and ranks of a LoRA that a folder's config describes, as `Ranks` takes them.

    Raises: ModelError M554 for patterns that differ between layers of one name, or alphas that follow no rule of ours.
    """
    ranks, alphas = (_by_name(folder, key, config.get(key) or {}) for key in sorted(PATTERNS, reverse=True))
    found = {name: alphas.get(name, config["lora_alpha"]) for name in ranks}
    alpha = float(config["lora_alpha"])
    if alphas.keys() <= ranks.keys() and set(found.values()) <= {alpha}:
        return alpha, ranks or None
    if found != {name: 2 * r for name, r in ranks.items()} or alphas.keys() - ranks.keys() or alpha != 2 * config["r"]:
        message = f"{folder} sets alpha_pattern={alphas}, neither one alpha for all layers nor twice their ranks."
        raise ModelError("M554", message, "give all layers one alpha.")
    return None, ranks


def _by_name(folder: Path, key: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A pattern by last names of layers. Raises: ModelError M554 if layers of one name differ."""
    found: dict[str, Any] = {}
    for path, value in pattern.items():
        if found.setdefault(last_name(path), value) != value:
            message = f"{folder}: {key} has several values for layers called '{last_name(path)}'."
            raise ModelError("M554", message, "give layers of one name one value.")
    return found
