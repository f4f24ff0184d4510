"""LoRA (arXiv:2106.09685) on the token embedding. Letters: r rank, v vocabulary, d width, b batch, s sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, path_of
from vlmpeft.tuners.attachment import WeightUpdate
from vlmpeft.tuners.base import TUNERS, check
from vlmpeft.tuners.peft_folder import check_settings, peft_settings
from vlmpeft.tuners.targets import replace_module


class LoRAEmbedding(WeightUpdate):
    """base(ids) + scale * B A[:, ids], with A (r, v) from zero and B (d, r) normal, in fp32: it starts as its base.

    Args: tied: whether the head shares the base's weight, so that merging would change the head, too.
    """

    base_layer: nn.Embedding

    def __init__(self, base: nn.Embedding, r: int, scale: float, tied: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.base_layer, self.scale, self.tied = base, scale, tied
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, base.num_embeddings, **options))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, r, **options))
        self.times = float(getattr(base, "scalar_embed_scale", 1.0))  # Gemma's embedding multiplies what it looks up

    @property
    def unmergeable(self) -> str:
        """See `Attachment.unmergeable`."""
        return "the head shares the embedding's weight and would change with it" if self.tied else ""

    def forward(self, ids: Tensor) -> Tensor:
        """(b, s) -> (b, s, d)."""
        out: Tensor = self.base_layer(ids)
        if not self.enabled or self.merged:
            return out
        low = F.embedding(ids, self.lora_embedding_A.T, self.base_layer.padding_idx)  # (b, s, r)
        return (out + low @ self.lora_embedding_B.T * (self.scale * self.times)).to(out.dtype)

    def delta(self) -> Tensor:
        """scale * (B A)^T, (v, d), fp32."""
        return (self.lora_embedding_B @ self.lora_embedding_A).T * self.scale

    def take_out(self, model: nn.Module, path: str) -> None:
        """Put the base back in its place."""
        self.unmerge()
        replace_module(model, path, self.base_layer)


@TUNERS.register("embedding_lora")
@dataclass(frozen=True)
class EmbeddingLoRA:
    """A low-rank update of the token embedding, that of every token; the head stays, even one that is tied to it.

    Args:
        r: rank.
        alpha: numerator of the scale alpha / r; None is 2 r.
        lr: learning rate of its own; None is the run's, `optim.lr`: 2e-4 unless it is set, as LLaVA and QLoRA have it.
    """

    kind: ClassVar[str] = "embedding_lora"
    r: int = 16
    alpha: float | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        check(self.r >= 1, "embedding_lora.r", self.r, "an integer of at least 1")
        check(self.alpha is None or self.alpha > 0, "embedding_lora.alpha", self.alpha, "a number above 0")
        check(self.lr is None or 0 < self.lr <= 1, "embedding_lora.lr", self.lr, "a number in (0, 1]")

    @property
    def part(self) -> str:
        """Where the embedding is."""
        return "language"

    @property
    def numerator(self) -> float:
        """alpha, with its default."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    def resolved(self) -> EmbeddingLoRA:
        """The same tuner with alpha written out."""
        return dataclasses.replace(self, alpha=self.numerator)

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Wrap the embedding. Returns: A and B, by name.

        Raises: ModelError M551 if the language model has no plain embedding, M552 if it has an adapter already.
        """
        language: Any = parts.language
        base = language.get_input_embeddings() if hasattr(language, "get_input_embeddings") else None
        if isinstance(base, LoRAEmbedding):
            raise ModelError("M552", "the embedding already carries an adapter.", "merge() or remove() it first.")
        if not isinstance(base, nn.Embedding):
            message = f"the input embedding is a {type(base).__name__}, which embedding_lora cannot wrap."
            raise ModelError("M551", message, "drop this tuner.")
        path = path_of(model, base)
        tied = getattr(parts.lm_head, "weight", None) is base.weight
        layer = LoRAEmbedding(base, self.r, self.numerator / self.r, tied)
        replace_module(model, path, layer.train(base.training))
        return {f"{path}.{name}": p for name, p in layer.own_parameters().items()}

    @property
    def in_peft(self) -> bool:
        """See `PeftForm.in_peft`."""
        return True

    @property
    def _settings(self) -> dict[str, object]:
        return {"r": self.r, "lora_alpha": self.numerator}

    def peft_config(self, base: str, targets: list[str]) -> dict[str, Any]:
        """See `PeftForm.peft_config`."""
        return peft_settings("LORA", self.part, base, targets, **self._settings)

    def check_peft(self, folder: Path) -> None:
        """See `PeftForm.check_peft`."""
        check_settings(folder, "LORA", self._settings)
