"""Tuned tensors and their files: PEFT folders for adapters, one file for the rest; read strictly, or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.errors import ModelError
from vlmpeft.parts import Parts, adapter_root, path_of
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import FillsOut, PeftForm, PeftTensors, Tuner, peft_form
from vlmpeft.tuners.peft_folder import PEFT_PREFIX

if TYPE_CHECKING:
    from vlmpeft.tune import Applied

Pending = list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
ADAPTERS = "adapters"
ADAPTER_FILE = "adapter_model.safetensors"
PROJECTOR = "projector.safetensors"
TRAINED = "trained.safetensors"
VIRTUAL = "prompt_embeddings"  # the one tensor of peft's files for virtual tokens, which no module holds
SAME = "was it trained with the same tuners and base?"


def plain_name(name: str) -> str:
    """A parameter's name as it is without adapters around it."""
    return re.sub(r"(\.base_layer)+\.", ".", name)  # one layer may carry several


def peft_key(name: str, root_prefix: str) -> str:
    """Key of a tensor in an adapter file: PEFT's prefix and the path below the adapter's root."""
    if name.endswith(f".{VIRTUAL}"):
        return VIRTUAL
    return PEFT_PREFIX + plain_name(name).removeprefix(root_prefix)


def _path(path: str) -> str:
    """A module's path as it is without adapters around it."""
    return plain_name(f"{path}.").removesuffix(".")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises: ModelError M502 if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError("M502", f"no weights file {path}.", "check the directory.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        fix = "restore it from another checkpoint."
        raise ModelError("M502", f"{path} is not a safetensors file: {error}.", fix) from error


def read_strict(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a safetensors file whose keys, shapes and finiteness must all be right.

    Raises: ModelError M502 naming the first missing, extra or misshapen tensor or one of another kind of number, M503
        one that is not finite in the model's dtype.
    """
    return check_tensors(path, read_tensors(path), expected)


def check_tensors(path: Path, found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were found in a file, if they are what `read_strict` asks for."""
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    for problem, names in (("lacks", missing), ("has the unknown", extra)):
        if names:
            raise ModelError("M502", f"{path} {problem} tensor '{min(names)}' ({len(names)} such).", SAME)
    for name, tensor in found.items():
        _check(path, name, tensor, expected[name])
    return found


def _check(path: Path, name: str, tensor: Tensor, expected: Tensor) -> None:
    """Raise unless `tensor` can stand where `expected` stands."""
    if tensor.shape != expected.shape:
        shapes = f"{tuple(tensor.shape)}, the model's is {tuple(expected.shape)}"
        raise ModelError("M502", f"{path}: tensor '{name}' is {shapes}.", SAME)
    if tensor.is_floating_point() != expected.is_floating_point() or tensor.is_complex() != expected.is_complex():
        kinds = f"{tensor.dtype}, the model's is {expected.dtype}".replace("torch.", "")
        raise ModelError("M502", f"{path}: tensor '{name}' holds {kinds}.", SAME)
    if not torch.isfinite(tensor.to(expected.dtype)).all():
        raise ModelError("M503", f"{path}: tensor '{name}' holds NaN or infinity.", "use an earlier checkpoint.")


@torch.no_grad()
def assign(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters and buffers of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def write_tuned(applied: Iterable[Applied], model: nn.Module, parts: Parts, directory: Path) -> set[str]:
    """Write `adapters/<name>/` in PEFT's format for every adapter, `projector.safetensors` for a fully tuned projector
    and `trained.safetensors` for the rest.

    Returns: names of the parameters written.
    """
    written: set[str] = set()
    rest: dict[str, Tensor] = {}
    for one in applied:
        if form := peft_form(one.tuner):
            _write_adapter(one, form, model, parts, directory / ADAPTERS / one.name)
        elif _is_projector(one.tuner):
            fs.write_tensors(directory / PROJECTOR, parts.projector.state_dict())
        else:
            rest |= {plain_name(k): p for k, p in with_frozen(one, model).items()}
        written |= set(one.parameters)
    if rest:
        fs.write_tensors(directory / TRAINED, rest)
    return written


def with_frozen(applied: Applied, model: nn.Module) -> dict[str, nn.Parameter]:
    """What a tuner trains and the frozen parameters beside it in the same attachments: an adapter needs both."""
    ours = {id(p) for p in applied.parameters.values()}
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        own = module.own_parameters() if isinstance(module, Attachment) else {}
        if ours & {id(p) for p in own.values()}:
            found |= {f"{path}.{name}": p for name, p in own.items()}
    return {**found, **applied.parameters}


def peft_tensors(applied: Applied, model: nn.Module) -> dict[str, Tensor]:
    """What an adapter's file holds, by name in `model`, in the form that `peft` has for it."""
    held: Mapping[str, Tensor] = with_frozen(applied, model)
    return applied.tuner.to_peft(held) if isinstance(applied.tuner, PeftTensors) else dict(held)


def _write_adapter(applied: Applied, tuner: PeftForm, model: nn.Module, parts: Parts, directory: Path) -> None:
    root, prefix = _root(tuner, model, parts)
    tensors = {peft_key(k, prefix): p for k, p in peft_tensors(applied, model).items()}
    ours = {id(p) for p in applied.parameters.values()}
    attached = [(path, m) for path, m in root.named_modules() if isinstance(m, Attachment)]
    targets = sorted({_path(p) for p, m in attached if ours & {id(x) for x in m.own_parameters().values()}})
    base = str(getattr(getattr(root, "config", None), "_name_or_path", "") or "")
    fs.write_tensors(directory / ADAPTER_FILE, tensors)
    fs.write_json(directory / "adapter_config.json", tuner.peft_config(base, targets))


def _root(tuner: PeftForm, model: nn.Module, parts: Parts) -> tuple[nn.Module, str]:
    """The module an adapter file is relative to, and its path with a dot."""
    root = adapter_root(model, parts) if tuner.part in ("language", "lm_head") else parts.get(tuner.part)
    path = path_of(model, root)
    return root, f"{path}." if path else ""


def read_tuned(applied: Iterable[Applied], model: nn.Module, parts: Parts, directory: Path) -> Pending:
    """Read what `write_tuned` wrote, or a single PEFT folder.

    Returns: parameters and their new values, all checked, none assigned yet.
    Raises: ModelError M502, M503, M554.
    """
    applied = list(applied)
    adapters = {one.name for one in applied if peft_form(one.tuner)}
    pending: Pending = []
    rest: dict[str, nn.Parameter] = {}
    for one in applied:
        if form := peft_form(one.tuner):
            folder = _adapter_folder(directory, one.name, adapters)
            form.check_peft(folder)
            prefix = _root(form, model, parts)[1]
            expected = peft_tensors(one, model)
            found = read_tensors(folder / ADAPTER_FILE)
            if isinstance(one.tuner, FillsOut):
                found = one.tuner.fill_out(folder, found)
            check_tensors(folder / ADAPTER_FILE, found, {peft_key(k, prefix): t for k, t in expected.items()})
            values = {name: found[peft_key(name, prefix)] for name in expected}
            if isinstance(one.tuner, PeftTensors):
                values = one.tuner.from_peft(values)
            pending.append((with_frozen(one, model), values))
        elif not _is_projector(one.tuner):
            rest |= {plain_name(k): p for k, p in with_frozen(one, model).items()}
    tunes_projector = any(_is_projector(one.tuner) for one in applied)
    if tunes_projector or (directory / PROJECTOR).exists():  # a saved projector comes back whoever tuned it
        state = parts.projector.state_dict()
        pending.append((state, read_strict(directory / PROJECTOR, state)))
    if rest or (directory / TRAINED).exists():
        pending.append((rest, read_strict(directory / TRAINED, rest)))
    return pending


def _adapter_folder(directory: Path, name: str, adapters: set[str]) -> Path:
    """Where an adapter lies: its folder among those that were saved, or a PEFT folder by itself."""
    folder = directory / ADAPTERS
    if not folder.is_dir():
        return directory
    there = {path.name for path in folder.iterdir() if path.is_dir()}
    if there != adapters:
        message = f"{folder} holds the adapters {sorted(there)}, but the tuners here are {sorted(adapters)}."
        raise ModelError("M502", message, "apply the tuners it was saved with.")
    return folder / name


def _is_projector(tuner: Tuner) -> bool:
    """Whether a tuner trains the projector whole, which has a file of its own."""
    return tuner.kind == "full" and tuner.part == "projector"
