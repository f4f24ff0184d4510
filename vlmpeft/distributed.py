"""Several processes: one loss, one decision, one first error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vlmpeft.errors import EnvironmentFault, VlmpeftError

FIRST = "vlmpeft/first_failure"
PATIENCE = timedelta(seconds=10)  # for the launcher's store, which is on this machine or the first one


def make_accelerator(device: torch.device, dtype: torch.dtype, timeout_s: int, **options: object) -> Accelerator:
    """Device, precision and process group of a run.

    Args:
        timeout_s: how long a process waits for the others before it gives up.
        options: of the Accelerator.

    Raises: EnvironmentFault E432 if the launcher asks for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        message = "the launch configuration asks for DeepSpeed, whose engine hides the step that this loop checks."
        raise EnvironmentFault("E432", message, "launch with recipes/launch/fsdp2.yaml or ddp.yaml.")
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[group], **options)


def total(accelerator: Accelerator, value: int | torch.Tensor) -> float:
    """The sum of a number over all processes."""
    return float(accelerator.reduce(torch.as_tensor(value, device=accelerator.device)).item())


def of_main(accelerator: Accelerator, find: Callable[[], float | None]) -> float | None:
    """What the main process finds, known to all."""
    found = [find() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` holds in any process."""
    return flag if accelerator.num_processes == 1 else total(accelerator, int(flag)) > 0


@contextlib.contextmanager
def failing_together(accelerator: Accelerator, left: str = "the last checkpoint is good") -> Iterator[None]:
    """Where one process of several fails, the others fail too, and all name the first error.

    A process that waits for one that is gone gets a broken connection and is not to blame.
    Args: left: what there is to go on from.
    Raises: EnvironmentFault E430 in a process that was not the first to fail.
    """
    try:
        yield
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        here = f"process {accelerator.process_index}"
        lost = _lost_contact(error)
        first = _first_failure("" if lost else f"{here}: {_line(error)}")
        if first.startswith(f"{here}: ") and isinstance(error, VlmpeftError):
            raise type(error)(error.code, f"{here}: {error.message}", error.fix) from error
        if first.startswith(f"{here}: ") or not (first or lost):
            raise
        why = first or f"it was killed, or did not answer within run.timeout_s ({_line(error)})."
        message = f"{here} ended because another failed first: {why}"
        raise EnvironmentFault("E430", message, f"mend that error; {left}.") from error


def _lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or silent; gloo says so in the text alone."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _line(error: BaseException) -> str:
    return error.line() if isinstance(error, VlmpeftError) else f"{type(error).__name__}: {error}".splitlines()[0]


def _first_failure(mine: str) -> str:
    """Register `mine` unless another process was first. Returns: the first one; "" if there is none or nobody knows."""
    with contextlib.suppress(KeyError, RuntimeError):  # the store is gone with the process that kept it
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=PATIENCE)
        if mine or store.check([FIRST]):
            return store.compare_set(FIRST, "", mine).decode() if mine else store.get(FIRST).decode()
    return ""
