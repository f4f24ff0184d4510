"""What one forward sees.

Letters: b batch, s sequence, i images, n tokens of an image, d feature width, m supervised tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmpeft.anyres import Tiling

IGNORE = -100  # label of a position without loss; torch.nn.functional.cross_entropy's default ignore_index
IMAGE_TOKEN_ID = -200  # placeholder id in models we assemble, as in LLaVA: no tokenizer can produce it


class Encoded(Protocol):
    """One sample ready for collation: equally long id, label and turn lists; tilings as `Batch.tilings`."""

    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def turns(self) -> Sequence[int]: ...
    @property
    def tilings(self) -> Sequence[Tiling]: ...


@dataclass(frozen=True)
class Batch:
    """A padded batch; see the module's letters for shapes.

    Args:
        input_ids: (b, s) int64; one placeholder id per image token, already expanded.
        attention_mask: (b, s) bool; False at padding.
        labels: (b, s) int64, unshifted; IGNORE where no loss.
        pixel_values: (i, 3, h, w), images in order of appearance, or features (i, n, d) computed before; None
            without images.
        turns: (b, s) int64; 0 for tokens that every turn sees, k for tokens of independent turn k, which see only
            turn 0 and themselves; None where every token sees all before it.
        supervised: (m,) int64, flat index into (b * s) of the positions that predict a supervised token; computed on
            the host, so that no step waits for the device.
        tilings: of every image, where its tokens depend on its size (data.tile_merge=spatial_unpad); None elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    turns: Tensor | None = None
    supervised: Tensor | None = None
    tilings: tuple[Tiling, ...] | None = None

    @property
    def num_supervised(self) -> int:
        """Supervised tokens in the batch, known on the host."""
        return 0 if self.supervised is None else len(self.supervised)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; copies from pinned memory do not block."""
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in self.tensors().items()}
        return dataclasses.replace(self, **pinned)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there."""
        return {k: v for k, v in self.inputs().items() if isinstance(v, Tensor)}

    def inputs(self) -> dict[str, Any]:
        """The fields that are there, as keyword arguments of a model's forward."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in fields.items() if v is not None}


def supervised_index(labels: Tensor) -> Tensor:
    """Flat positions whose next token carries a label. Args: labels (b, s). Returns: (m,) int64."""
    next_labels = torch.full_like(labels, IGNORE)
    next_labels[:, :-1] = labels[:, 1:]
    return (next_labels.flatten() != IGNORE).nonzero(as_tuple=True)[0]


def collate(samples: Sequence[Encoded], images: Sequence[Tensor] = (), side: str = "right") -> Batch:
    """Pad samples to the longest of them.

    Args:
        samples: at least one.
        images: one tensor an image, (3, h, w) or (n, d), in order of appearance.
        side: "right" for training, "left" for generation.
    """
    width = max(len(s.input_ids) for s in samples)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        out = torch.full((len(rows), width), fill, dtype=torch.int64)
        for i, row in enumerate(rows):
            start = 0 if side == "right" else width - len(row)
            out[i, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        return out

    labels = padded([s.labels for s in samples], IGNORE)
    independent = any(t for s in samples for t in s.turns)
    return Batch(
        input_ids=padded([s.input_ids for s in samples], 0),
        attention_mask=padded([[1] * len(s.input_ids) for s in samples], 0).bool(),
        labels=labels,
        pixel_values=torch.stack(list(images)) if images else None,
        turns=padded([s.turns for s in samples], 0) if independent else None,
        supervised=supervised_index(labels),
        tilings=tuple(tiling for s in samples for tiling in s.tilings) or None,
    )
