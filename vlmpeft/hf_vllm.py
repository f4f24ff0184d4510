"""A model of ours as vLLM serves it: a LLaVA of transformers and, unless it is merged, its LoRA beside it.

What vLLM takes is read from its `lora/peft_helper.py`, `lora/lora_model.py` and `config/lora.py` (0.33).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from vlmpeft.adapter_files import Adapter, factors_of, write_adapter
from vlmpeft.build import Bundle
from vlmpeft.conversion import no_form
from vlmpeft.hf_llava import export_hf
from vlmpeft.hf_peft import hub_names, plain_lora
from vlmpeft.tune import Applied
from vlmpeft.tuners.peft_folder import PEFT_PREFIX
from vlmpeft.weights import ADAPTERS, plain_name

WHERE = "an adapter that vLLM serves"
FIX = "fold everything into the weights with merge=true."
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; 16 unless it is told."""


def export_vllm(bundle: Bundle, target: Path) -> str:
    """Write what `export_hf` writes, and in `adapters/NAME/` the LoRA of the language model if it is not merged.

    The projector and whatever else was trained in place lie in the weights either way: vLLM takes no `modules_to_save`.
    All layers of the adapter have one rank and one scale, since releases of vLLM before 0.33 read no `rank_pattern`.
    Returns: the command that serves it.
    Raises: ModelError M570 as `export_hf`, and for what vLLM knows as no adapter.
    """
    inside = bundle.tuned.plain_state().keys()
    added = [a for a in bundle.tuned.applied.values() if not {plain_name(name) for name in a.parameters} <= inside]
    served = _served(bundle, added, target) if added else None
    export_hf(bundle, target)
    command = f"vllm serve {shlex.quote(str(target))}"
    if served is None:
        return command
    name, adapter = served
    folder = target / ADAPTERS / name
    limit = next(n for n in RANKS if n >= write_adapter(adapter, folder))
    return f"{command} --enable-lora --max-lora-rank {limit} --lora-modules {name}={shlex.quote(str(folder))}"


def _served(bundle: Bundle, added: Sequence[Applied], base: Path) -> tuple[str, Adapter]:
    """The LoRA that lies beside the base, and its name. Raises: ModelError M570 if vLLM takes none of it."""
    one, tuner = plain_lora(added, WHERE, FIX)
    tensors = hub_names(one, bundle.model)
    modules = sorted({name.rsplit(".", 2)[0] for name in tensors})
    config = tuner.peft_config(str(base), modules)
    layers = factors_of(base, config, {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()})
    r = max(factors.r for factors in layers.values())
    if r > RANKS[-1]:
        raise no_form(f"rank {r}", f"{WHERE} (at most {RANKS[-1]})", FIX)
    return one.name, Adapter(layers, str(base), "CAUSAL_LM")
