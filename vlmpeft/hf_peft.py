"""What a model of ours tuned as one adapter folder, which stock peft loads on the exported Hugging Face base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.build import Bundle
from vlmpeft.conversion import check_language, no_form
from vlmpeft.hf_llava import check_projector, is_next
from vlmpeft.llava_layout import MEMORY, renamed
from vlmpeft.tune import Applied
from vlmpeft.tuners import LoRA
from vlmpeft.tuners.peft_folder import PEFT_PREFIX
from vlmpeft.weights import ADAPTER_FILE, peft_tensors

WHERE = "a peft adapter on transformers' LLaVA"
PROJECTOR = "multi_modal_projector"
FIX = "use to=hf, which holds all weights."


def export_peft(bundle: Bundle, target: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors: the LoRA of the language model and the projector.

    One file holds both: `target_modules` is a pattern below the language model alone, as the tower's layers bear the
    same names, and `modules_to_save` the projector.

    Args: base: written as `base_model_name_or_path`; what `to=hf merge=false` wrote.
    Raises: ModelError M570 if the model cannot be expressed, or tuned what such a folder cannot hold.
    """
    if is_next(bundle):
        raise no_form("the newline of data.tile_merge=spatial_unpad", WHERE, FIX)
    check_projector(bundle)
    check_language(bundle, WHERE)
    one, tuner = plain_lora([a for a in bundle.tuned.applied.values() if not _whole_projector(a)], WHERE, FIX)
    tensors = hub_names(one, bundle.model)
    modules = sorted({name.rsplit(".", 2)[0] for name in tensors})
    state = {f"projector.{k}": v for k, v in bundle.model.projector.state_dict().items()}
    config = tuner.peft_config(base, modules) | {"target_modules": pattern(modules), "modules_to_save": [PROJECTOR]}
    with fs.new_directory(target) as directory:
        found = {PEFT_PREFIX + name: tensor for name, tensor in (tensors | renamed(state, MEMORY)).items()}
        fs.write_tensors(directory / ADAPTER_FILE, found)
        fs.write_json(directory / "adapter_config.json", config)


def _whole_projector(one: Applied) -> bool:
    return one.tuner.kind == "full" and one.tuner.part == "projector"


def plain_lora(applied: Sequence[Applied], where: str, fix: str) -> tuple[Applied, LoRA]:
    """The one adapter there is, a LoRA of the language model that acts on all tokens.

    Args: where: the format it is for; fix: what to do instead, for messages.
    Raises: ModelError M570 if there is none, or another one.
    """
    found: list[tuple[Applied, LoRA]] = []
    for one in applied:
        tuner = one.tuner
        gate = f" where={tuner.where}" if isinstance(tuner, LoRA) and tuner.where != "all" else ""
        if not isinstance(tuner, LoRA) or tuner.part != "language" or gate:
            raise no_form(f"tuner '{one.name}' ({tuner.kind} on {tuner.part}{gate})", where, fix)
        found.append((one, tuner))
    if not found:
        raise no_form("a model without LoRA", where, fix)
    return found[0]  # a part has no second LoRA


def hub_names(one: Applied, model: nn.Module) -> dict[str, Tensor]:
    """An adapter's tensors under the names that the exported model's modules have in memory."""
    return renamed(peft_tensors(one, model), MEMORY)


def pattern(modules: Sequence[str]) -> str:
    """A regular expression that matches these module paths, with any number for the block."""
    pieces = [["[0-9]+" if piece.isdigit() else piece for piece in module.split(".")] for module in modules]
    return "|".join(sorted({r"\.".join(path) for path in pieces}))
