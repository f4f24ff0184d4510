"""adapter_config.json: what it says of an adapter for `peft`, written and compared key by key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmpeft.errors import ModelError

PEFT_PREFIX = "base_model.model."  # of every name in a file of peft
_CHANGES = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "fan_in_fan_out", "kasa_config",
    "layer_replication", "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config", "block_share", "coft",
    "decompose_both",
)  # fmt: skip
"""Keys of peft's configs that change what an adapter computes or what its file holds."""
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of peft's `init_lora_weights` with which peft changes the base before it reads the adapter."""


def peft_settings(peft_type: str, part: str, base: str, targets: list[str], **method: object) -> dict[str, Any]:
    """An adapter_config.json. Args: method: the keys of the method itself."""
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM" if part in ("language", "lm_head") else None,
        "base_model_name_or_path": base,
        **method,
        "target_modules": targets,
        **({} if peft_type == "LOKR" else {"bias": "none"}),  # which peft's LoKr has no key for
        "inference_mode": True,
    }


def read_config(
    directory: Path, peft_type: str, numbers: tuple[str, ...] = (), ours: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder.

    Args:
        numbers: keys that must be there and be numbers.
        ours: keys that the caller understands.

    Raises: ModelError M502 if it is missing or damaged, M554 for another method or for settings that change it.
    """
    path = directory / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError("M502", f"{path} cannot be read: {error}.", "check the directory.") from error
    if not isinstance(config, dict) or not all(isinstance(config.get(k), int | float) for k in numbers):
        raise ModelError("M502", f"{path} gives no numbers {' and '.join(numbers)}.", "check the directory.")
    if config.get("peft_type") != peft_type:
        raise ModelError("M554", f"{path} describes {config.get('peft_type')!r}, not {peft_type}.")
    for key in _CHANGES:
        if key not in ours and config.get(key) and config[key] != "none":
            raise ModelError("M554", f"{path} sets {key}={config[key]!r}, which this tuner does not have.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_MOVED):
        fix = "convert it with peft's path_initial_model_for_weight_conversion."
        raise ModelError("M554", f"{path} sets init_lora_weights={init!r}: its weights are for a changed base.", fix)
    return config


def check_settings(
    directory: Path,
    peft_type: str,
    expected: Mapping[str, object],
    ours: frozenset[str] = frozenset(),
    numbers: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The config of a PEFT folder that has these values: shapes do not tell. Args: ours, numbers: as `read_config`.

    Raises: ModelError M502 for other values, M502 and M554 as `read_config`.
    """
    config = read_config(directory, peft_type, numbers, ours | frozenset(expected))
    for key, value in expected.items():
        if config.get(key) != value:
            message = f"{directory} has {key}={config.get(key)!r}; the tuner here has {value!r}."
            raise ModelError("M502", message, "apply the tuner it was trained with.")
    return config
