"""The anatomy of a vision-language model, described once. Every tuner, probe and exporter speaks to `Parts` only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from vlmpeft.errors import ModelError, nearest

PARTS = ("vision", "projector", "language", "lm_head")


@dataclass(frozen=True)
class Parts:
    """The parts of a VLM; they may nest (the head inside the language model): the most specific one wins.

    Args:
        vision: (i, 3, h, w) -> features.
        projector: features -> language-model embeddings.
        language: the language model, with or without its head.
        lm_head: hidden states -> logits.
        blocks: the decoder blocks of `language`, in order.
        image_token_id: the id that stands for one image token in `input_ids`.
    """

    vision: nn.Module
    projector: nn.Module
    language: nn.Module
    lm_head: nn.Module
    blocks: Sequence[nn.Module]
    image_token_id: int

    def get(self, part: str) -> nn.Module:
        """The module of a part. Raises: ModelError M530 for an unknown name."""
        if part not in PARTS:
            raise ModelError("M530", f"no part '{part}'{nearest(part, PARTS)}")
        module: nn.Module = getattr(self, part)
        return module


@runtime_checkable
class HasParts(Protocol):
    """A model that describes itself, as those we assemble do."""

    @property
    def parts(self) -> Parts: ...


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Dotted path of `module` inside `model`, "" for the model itself. Raises: ModelError M531 if it is not inside."""
    for name, candidate in model.named_modules():
        if candidate is module:
            return name
    raise ModelError(
        "M531", f"{type(module).__name__} is not inside {type(model).__name__}.", "take parts from the same model."
    )


def parts_by_name(model: nn.Module, parts: Parts) -> dict[str, str]:
    """The part of every parameter, by its name in `model`; what no part holds is "other"."""
    paths = [(path_of(model, parts.get(p)).removesuffix(".base_layer"), p) for p in PARTS]  # a head may be wrapped
    prefixes = sorted(paths, key=lambda item: -len(item[0]))

    def part(name: str) -> str:
        return next((p for prefix, p in prefixes if prefix == "" or name.startswith(prefix + ".")), "other")

    return {name: part(name) for name, _ in model.named_parameters()}


def parameter_table(
    model: nn.Module, parts: Parts, tuner_of: Mapping[str, str], added: Collection[str]
) -> list[dict[str, object]]:
    """Count what trains, per part, each tensor once.

    Args:
        tuner_of: the tuner of every trained parameter, by the parameter's name.
        added: names of parameters that adapters brought; `total` counts the model without them.

    Returns: rows with "part", "tuners", "trainable" and "total".
    """
    part_of = parts_by_name(model, parts)
    tuners: dict[str, set[str]] = {part: set() for part in part_of.values()}
    trainable, total = dict.fromkeys(tuners, 0), dict.fromkeys(tuners, 0)
    for name, parameter in model.named_parameters():
        part = part_of[name]
        total[part] += 0 if name in added else parameter.numel()
        if parameter.requires_grad:
            trainable[part] += parameter.numel()
            tuners[part].add(tuner_of.get(name, "?"))
    return [{"part": p, "tuners": sorted(tuners[p]), "trainable": trainable[p], "total": total[p]} for p in tuners]


def table_text(stage: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """`parameter_table` for people: a line per part, the language model with its head, and the sum."""
    lines = [f"{stage}: trainable parameters"]
    lines += [_table_line(row["part"], [row], _who(row)) for row in rows]
    if any(row["part"] == "lm_head" for row in rows):
        lines.append(
            _table_line("LLM", [row for row in rows if row["part"] in ("language", "lm_head")], "with its head")
        )
    return "\n".join([*lines, _table_line("all", rows, "")])


def _who(row: Mapping[str, Any]) -> str:
    """The tuners of a row, and what there is to say of their count."""
    return ", ".join(row["tuners"]) + (f" ({row['note']})" if row.get("note") else "")


def _table_line(name: str, rows: Sequence[Mapping[str, Any]], note: str) -> str:
    trainable, total = (sum(int(row[key]) for row in rows) for key in ("trainable", "total"))
    share = math.floor(10_000 * trainable / max(1, total)) / 100  # cut, so that only all of it reads 100.00%
    return f"  {name:<10} {trainable:>13,} of {total:>15,}  {share:6.2f}%  {note}".rstrip()


def adapter_root(model: nn.Module, parts: Parts) -> nn.Module:
    """The module whose paths key an adapter file: a complete causal LM by itself, or else the whole model.

    In models we assemble `language` holds its own head, so stock `peft` loads the adapter on that causal LM; Hugging
    Face VLMs keep the head outside it, and there `peft` loads it on the VLM.
    """
    head_inside = any(module is parts.lm_head for module in parts.language.modules())
    return parts.language if head_inside else model


LAYOUTS = {  # where Hugging Face models keep a part, the first path that is there; a projector may lie inside the tower
    "vision": ("model.vision_tower", "model.vision_model", "model.visual", "vision_tower", "vision_model"),
    "projector": (
        "model.multi_modal_projector", "model.connector", "model.visual.merger", "multi_modal_projector",
        "language_projection",
    ),
    "language": ("model.language_model", "model.text_model", "language_model"),
    "lm_head": ("lm_head", "language_model.lm_head"),
}  # fmt: skip
BLOCKS = ("layers", "model.layers", "model.decoder.layers")  # inside the language model


def _child(model: nn.Module, paths: Sequence[str]) -> nn.Module | None:
    for path in paths:
        with contextlib.suppress(AttributeError):
            return model.get_submodule(path)
    return None


def parts_of(model: nn.Module) -> Parts:
    """Find the parts of a model we assembled or of a Hugging Face VLM: LLaVA and its kin (LLaVA-NeXT, LLaVA-OneVision,
    PaliGemma, InternVL, Mistral 3, Gemma 3, Aya Vision), Idefics and SmolVLM, Qwen-VL from the second on, BLIP-2.

    Raises: ModelError M532 with what is missing, for layouts we do not know.
    """
    if isinstance(model, HasParts) and isinstance(model.parts, Parts):
        return model.parts
    found = {part: _child(model, paths) for part, paths in LAYOUTS.items()}
    blocks = None if found["language"] is None else _child(found["language"], BLOCKS)
    config = getattr(model, "config", None)
    image_token_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    known = {name: part for name, part in found.items() if part is not None}
    missing = [name for name in PARTS if name not in known]
    missing += [] if isinstance(blocks, nn.ModuleList) or "language" in missing else ["the decoder blocks"]
    missing += ["image_token_id"] if image_token_id is None else []
    if missing or image_token_id is None or not isinstance(blocks, nn.ModuleList):
        raise _unknown_layout(model, ", ".join(missing))
    return Parts(**known, blocks=list(blocks), image_token_id=int(image_token_id))


def _unknown_layout(model: nn.Module, missing: str) -> ModelError:
    fields = "vision=..., projector=..., language=..., lm_head=..., blocks=..., image_token_id=..."
    message = f"cannot find {missing} in a {type(model).__name__}."
    return ModelError("M532", message, f"describe it yourself: vlmpeft.Parts({fields}).")
