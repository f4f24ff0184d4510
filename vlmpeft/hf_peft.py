"""What a model of ours tuned as one adapter folder, which stock peft loads on the exported Hugging Face base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vlmpeft import fs
from vlmpeft.build import Bundle
from vlmpeft.conversion import check_language, no_form
from vlmpeft.hf_llava import check_projector, is_next
from vlmpeft.llava_layout import MEMORY, new_name, renamed
from vlmpeft.tune import Applied
from vlmpeft.tuners import LoRA
from vlmpeft.tuners.peft_folder import PEFT_PREFIX
from vlmpeft.weights import ADAPTER_FILE, peft_tensors

WHERE = "a peft adapter on transformers' LLaVA"
PROJECTOR = "multi_modal_projector"


def export_peft(bundle: Bundle, target: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors: the LoRA of the language model and the projector.

    One file holds both: `target_modules` is a pattern below the language model alone, as the tower's layers bear the
    same names, and `modules_to_save` the projector.

    Args: base: written as `base_model_name_or_path`; what `to=hf merge=false` wrote.
    Raises: ModelError M570 if the model cannot be expressed, or tuned what such a folder cannot hold.
    """
    if is_next(bundle):
        raise no_form("the newline of data.tile_merge=spatial_unpad", WHERE, "use to=hf, which holds all weights.")
    check_projector(bundle)
    check_language(bundle, WHERE)
    one, tuner = _adapter(list(bundle.tuned.applied.values()))
    tensors: dict[str, Tensor] = peft_tensors(one, bundle.model)
    tensors |= {f"projector.{k}": v for k, v in bundle.model.projector.state_dict().items()}
    modules = [new_name(name, MEMORY).rsplit(".", 2)[0] for name in one.parameters]
    config = tuner.peft_config(base, modules) | {"target_modules": pattern(modules), "modules_to_save": [PROJECTOR]}
    with fs.new_directory(target) as directory:
        found = {PEFT_PREFIX + name: tensor for name, tensor in renamed(tensors, MEMORY).items()}
        fs.write_tensors(directory / ADAPTER_FILE, found)
        fs.write_json(directory / "adapter_config.json", config)


def _adapter(applied: Sequence[Applied]) -> tuple[Applied, LoRA]:
    """The one LoRA of the language model. Raises: ModelError M570 if there is none, or more than it and a projector."""
    for one in applied:
        full_projector = one.tuner.kind == "full" and one.tuner.part == "projector"
        if not full_projector and not (isinstance(one.tuner, LoRA) and one.tuner.part == "language"):
            what = f"tuner '{one.name}' ({one.tuner.kind} on {one.tuner.part})"
            raise no_form(what, WHERE, "use to=hf, which holds all weights.")
    for one in applied:
        if isinstance(one.tuner, LoRA):
            return one, one.tuner
    raise no_form("a model without LoRA", WHERE, "use to=hf.")


def pattern(modules: Sequence[str]) -> str:
    """A regular expression that matches these module paths, with any number for the block."""
    pieces = [["[0-9]+" if piece.isdigit() else piece for piece in module.split(".")] for module in modules]
    return "|".join(sorted({r"\.".join(path) for path in pieces}))
