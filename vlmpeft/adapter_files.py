"""LoRA folders as weight updates, whatever their ranks, scales and target sets; and back as one folder for `peft`.

Letters: r rank, d_in d_out widths.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmpeft import fs
from vlmpeft.errors import ModelError
from vlmpeft.tuners.peft_folder import PEFT_PREFIX, peft_settings, read_config
from vlmpeft.weights import ADAPTER_FILE, ADAPTERS, read_tensors

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Factors:
    """The update B A of one layer, its scale folded in; of an embedding it is the transpose that is added.

    Args: a: (r, d_in). b: (d_out, r). names: how `peft` calls the two.
    """

    a: Tensor
    b: Tensor
    names: tuple[str, str] = LINEAR

    @property
    def r(self) -> int:
        """The rank its shapes allow."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> Tensor:
        """The update, (d_out, d_in)."""
        return self.b @ self.a

    def norm(self) -> float:
        """Frobenius norm of the update, from the products of its factors with themselves."""
        a, b = self.a.double(), self.b.double()
        return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))

    def scaled(self, weight: float | Tensor) -> Factors:
        """The update times a number, or with every column times its own, (d_in,)."""
        if isinstance(weight, Tensor) and weight.ndim:
            return dataclasses.replace(self, a=self.a * weight)
        return dataclasses.replace(self, b=self.b * weight)

    def padded(self, r: int) -> Factors:
        """The same update with rows and columns of zeros up to rank `r`."""
        more = r - self.r
        return dataclasses.replace(self, a=F.pad(self.a, (0, 0, 0, more)), b=F.pad(self.b, (0, more)))


@dataclass(frozen=True)
class Adapter:
    """A LoRA as updates by the path of their layer, and what its folder says of the model it is for."""

    layers: Mapping[str, Factors]
    base: str = ""
    task: str | None = None


def adapter_folder(directory: Path) -> Path:
    """The adapter of a model directory, or a PEFT folder by itself.

    Raises: ModelError M581 if there are several adapters, none, or no such directory.
    """
    folder = directory / ADAPTERS
    if not folder.is_dir():
        if not directory.is_dir():
            raise ModelError("M581", f"no directory {directory}.", "name a PEFT folder or a model directory.")
        return directory
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ModelError("M581", f"{directory} holds the adapters: {names}.", f"name one: {folder}/NAME.")
    return found[0]


def read_adapter(directory: Path) -> Adapter:
    """The LoRA of a PEFT folder or of a model directory, in fp32.

    Raises: ModelError M581 as `adapter_folder`; M502, M554 for a folder that is no plain LoRA; M503 for NaN.
    """
    folder = adapter_folder(directory)
    config = read_config(folder, "LORA", ("r", "lora_alpha"), frozenset({"rank_pattern", "alpha_pattern"}))
    layers = factors_of(folder, config, read_tensors(folder / ADAPTER_FILE))
    for path, factors in layers.items():
        if factors.r != _setting(config, "rank_pattern", path, config["r"]):
            raise ModelError("M502", f"{folder}: {path} has rank {factors.r}, unlike its config.", "check the folder.")
    return Adapter(layers, str(config.get("base_model_name_or_path") or ""), config.get("task_type"))


def factors_of(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The updates that a config and tensors of `peft` describe, by the path of their layer, in fp32.

    Args: folder: where they are from, for messages.
    Raises: ModelError M502 for tensors that are no pairs of a LoRA, M503 for NaN.
    """
    left, layers = dict(tensors), dict[str, Factors]()
    for names in (LINEAR, EMBEDDING):
        for key in sorted(k for k in tensors if k.endswith(f".{names[0]}")):
            path = key.removeprefix(PEFT_PREFIX).removesuffix(f".{names[0]}")
            b = left.pop(key.removesuffix(names[0]) + names[1], None)
            layers[path] = _factors(folder, path, left.pop(key), b, names).scaled(_scale(config, path))
    if left or not layers:
        what = f"tensor '{min(left)}', which is no pair of a LoRA" if left else "no tensors"
        raise ModelError("M502", f"{folder / ADAPTER_FILE} holds {what}.", "name a folder with a plain LoRA.")
    return layers


def _factors(folder: Path, path: str, a: Tensor, b: Tensor | None, names: tuple[str, str]) -> Factors:
    """A and B that fit together. Raises: ModelError M502, M503."""
    if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        shapes = f"A {tuple(a.shape)} and B {'missing' if b is None else tuple(b.shape)}"
        raise ModelError("M502", f"{folder}: {path} has {shapes}.", "only linear layers and embeddings can be merged.")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ModelError("M503", f"{folder}: {path} holds NaN or infinity.", "use an earlier checkpoint.")
    return Factors(a.float(), b.float(), names)


def _setting(config: Mapping[str, Any], pattern: str, path: str, default: float) -> float:
    """What a config says of one layer: the first entry of its pattern whose key is the end of the layer's path."""
    patterns = config.get(pattern) or {}
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), default)  # as peft matches


def _scale(config: Mapping[str, Any], path: str) -> float:
    """alpha / r or alpha / sqrt(r) of a layer."""
    r = _setting(config, "rank_pattern", path, config["r"])
    alpha = _setting(config, "alpha_pattern", path, config["lora_alpha"])
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def write_adapter(adapter: Adapter, directory: Path) -> int:
    """Write a folder that stock `peft` loads, every layer padded to the largest rank, its scale 1.

    Returns: the rank. Raises: CheckpointError K201, K206.
    """
    r = max(factors.r for factors in adapter.layers.values())
    tensors: dict[str, Tensor] = {}
    for path, factors in adapter.layers.items():
        whole = factors.padded(r)
        tensors |= {f"{PEFT_PREFIX}{path}.{n}": t for n, t in zip(factors.names, (whole.a, whole.b), strict=True)}
    config = peft_settings("LORA", "language", adapter.base, sorted(adapter.layers), r=r, lora_alpha=r)
    with fs.new_directory(directory) as folder:
        fs.write_tensors(folder / ADAPTER_FILE, tensors)
        fs.write_json(folder / "adapter_config.json", {**config, "task_type": adapter.task})
    return r
