"""The tensor names of one LLaVA model in four layouts, and back. Letters: v rows of the vocabulary, d width.

ours: `vision.*` (the tower), `projector.*`, `language.*` (the causal LM's own names).
hub: files of `llava-hf` models, which every version of transformers reads.
memory: the same model as `LlavaForConditionalGeneration` names its parameters since 4.52; PEFT adapters use these.
original: checkpoints of the LLaVA and MobileVLM repositories.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, cat

from vlmpeft.errors import ModelError

Pairs = tuple[tuple[str, str], ...]
_LINEARS = (("projector.0.", "multi_modal_projector.linear_1."), ("projector.2.", "multi_modal_projector.linear_2."))
_NEWLINE = "projector.image_newline"  # of models whose tiles merge by spatial_unpad, as LLaVA-NeXT's do
HUB: Pairs = (
    ("language.", "language_model."),
    *_LINEARS,
    (_NEWLINE, "image_newline"),
    ("vision.", "vision_tower.vision_model."),
)
MEMORY: Pairs = (
    ("language.model.", "model.language_model."),
    ("language.lm_head.", "lm_head."),
    *((ours, f"model.{theirs}") for ours, theirs in _LINEARS),
    (_NEWLINE, "model.image_newline"),
    ("vision.", "model.vision_tower."),
)
ORIGINAL: Pairs = (
    (_NEWLINE, "model.image_newline"),
    ("projector.", "model.mm_projector."),
    ("vision.", "model.vision_tower.vision_tower.vision_model."),
    ("language.", ""),  # last: every name begins with it
)
PLAIN, NEXT = KINDS = ("llava", "llava_next")  # model types of transformers
HALVES = {  # transformers' `key_mapping`: one half of a file, in the hub's layout or that of memory, by itself
    "vision": {r"^(model\.)?vision_tower\.": ""},
    "language": {r"^language_model\.": "", r"^model\.language_model\.": "model."},
}
EMBEDDINGS, HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"


def renamed(tensors: Mapping[str, Tensor], pairs: Pairs, back: bool = False) -> dict[str, Tensor]:
    """Tensors under the names of another layout.

    Args: pairs: (ours, theirs) beginnings of names. back: from theirs to ours.
    Raises: ModelError M571 for a name that no pair covers.
    """
    return {new_name(name, pairs, back): tensor for name, tensor in tensors.items()}


def new_name(name: str, pairs: Pairs, back: bool = False) -> str:
    """One name in another layout; see `renamed`."""
    for ours, theirs in pairs:
        old, new = (theirs, ours) if back else (ours, theirs)
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ModelError("M571", f"tensor '{name}' has no place in a LLaVA model.", "check what the directory holds.")


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """(v, d) -> (rows, d): more rows, each the mean of those there are.

    LLaVA's converter draws them around that mean; the mean itself is the same every time, and a token whose logit is
    the mean of all logits is never the likeliest.
    """
    if rows == len(weight):
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return cat([weight, mean.expand(rows - len(weight), -1)])


def to_hub(tensors: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Our tensors as a file of the hub's layout, the vocabulary padded to `rows`."""
    padded = {k: with_rows(t, rows) if k in (EMBEDDINGS, HEAD) else t for k, t in tensors.items()}
    return renamed(padded, HUB)


def read_llava(directory: Path, rows: int | None = None) -> dict[str, Tensor]:
    """Tensors of a LLaVA directory (hub or original layout, one file or several) under our names, bit for bit.

    Args: rows: of the vocabulary to keep; None keeps all.
    Raises: ModelError M571 for a directory that holds no LLaVA model.
    """
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    if any(name.startswith("multi_modal_projector.") for name in found):
        tensors = renamed(found, HUB, back=True)
    elif any(name.startswith("model.mm_projector.") for name in found):
        tensors = renamed(found, ORIGINAL, back=True)
    else:
        message = f"{directory} holds no LLaVA model: no tensor of a projector in its safetensors files."
        raise ModelError("M571", message, "name a directory of the hub's or of LLaVA's layout.")
    return {k: t[:rows].contiguous() if k in (EMBEDDINGS, HEAD) else t for k, t in tensors.items()}
