"""The processes that share an evaluation: one, or those of `accelerate launch` and torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TIMEOUT_S = 7200  # how long a process waits for the others: longer than any batch, or loading, takes


@dataclass(frozen=True)
class Team:
    """rank: this process's number, of `size`. device: where its model goes. wait: until all have come as far."""

    rank: int = 0
    size: int = 1
    device: str = "auto"
    wait: Callable[[], None] = lambda: None

    @property
    def main(self) -> bool:
        """Whether this process reads, writes and speaks for all."""
        return self.rank == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[Team]:
    """This process as one of those that were launched together, if they were.

    Raises: EnvironmentFault E412 for a device that is not there, E430 where another process failed first.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team(device=device)
        return

    import torch

    from vlmpeft.build import choose_device
    from vlmpeft.distributed import failing_together, make_accelerator

    accelerator = make_accelerator(choose_device(device), torch.float32, TIMEOUT_S)
    with failing_together(accelerator, "the answers so far are kept"):
        place, wait = str(accelerator.device), accelerator.wait_for_everyone
        yield Team(accelerator.process_index, accelerator.num_processes, place, wait)
        accelerator.end_training()  # not after an error, which the others still have to hear of
