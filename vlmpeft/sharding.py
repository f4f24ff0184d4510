"""FSDP2: parameters lie in pieces on all processes and come together block by block, only while they are used.

The blocks are those of `Parts`, so nothing names a class. What remains (encoder, projector, embeddings, head; tied
ones are one tensor there) is one more unit. Frozen parameters are spread too: that is what saves the memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlmpeft.errors import EnvironmentFault
from vlmpeft.tune import Applied, Tuned
from vlmpeft.weights import with_frozen


def wanted(accelerator: Accelerator) -> bool:
    """Whether the launcher asks for FSDP2; `accelerate launch` says so in the environment.

    Raises: EnvironmentFault E431 for FSDP 1 and for offloading, which this loop does not drive.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2" or parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        found = "fsdp_offload_params" if version == "2" else f"fsdp_version {version}"
        message = f"the launch configuration asks for {found}, which training does not support."
        raise EnvironmentFault("E431", message, "launch with recipes/launch/fsdp2.yaml.")
    return True


def shard(tuned: Tuned, accelerator: Accelerator) -> None:
    """Spread a model over all processes, in place and for good; `tuned` then holds the pieces."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True)
    for block in tuned.parts.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(tuned.model, mesh=mesh)
    _hold(tuned)


def _hold(tuned: Tuned) -> None:
    """Make `tuned` hold the parameters that stand in the model now."""
    standing = dict(tuned.model.named_parameters())
    for key, applied in tuned.applied.items():
        now = {name: standing[name] for name in applied.parameters}
        tuned.applied[key] = Applied(applied.name, applied.tuner, now)


def synchronise(model: nn.Module, on: bool) -> None:
    """Whether the next backward of a sharded model sums gradients over the processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process: each must call this. A tensor that is not in pieces stays as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor that every process holds, laid out as `model` is."""
    tensor = tensor.to(model.device)
    if isinstance(model, DTensor):
        return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
    return tensor


@contextlib.contextmanager
def whole(tuned: Tuned, keep: bool = False) -> Iterator[None]:
    """Inside, all that is saved (tuned parameters, projector) is whole, on the CPU; every process must enter.

    Args: keep: what is changed inside goes back into the pieces. Without pieces nothing happens here.
    """
    for module in tuned.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without backward leaves the outermost unit together
    projector = {id(p) for p in tuned.parts.projector.parameters()}
    held = {n for applied in tuned.applied.values() for n in with_frozen(applied, tuned.model)}
    names = held | {n for n, p in tuned.model.named_parameters() if id(p) in projector}
    standing = dict(tuned.model.named_parameters())
    pieces = {n: p for n in sorted(names) if isinstance(p := standing[n], DTensor)}
    copies = {n: nn.Parameter(gathered(p).detach().cpu(), p.requires_grad) for n, p in pieces.items()}
    _place(tuned, copies)
    try:
        yield
    finally:
        _place(tuned, pieces)
        if keep:
            with torch.no_grad():
                for name, piece in pieces.items():
                    piece.copy_(like(copies[name].detach(), piece))


def _place(tuned: Tuned, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        tuned.model.get_submodule(owner).register_parameter(leaf, parameter)
    _hold(tuned)
