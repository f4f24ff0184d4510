"""Asking in batches that are kept as they come: what was asked before is not asked again, nor by two processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vlmpeft.errors import EnvironmentFault, EvalError
from vlmpeft.eval.answer_log import AnswerLog, Pairs

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from vlmpeft.decode import Answer, Request
    from vlmpeft.eval.runner import Answerer


def batches_of(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Indices in batches: those about the same images together, then the longest prompts first.

    The plan depends on the requests alone, so that every process, and a run that goes on, makes the same batches.
    """
    from vlmpeft.decode import images_key, plan_batches

    keys = [(bool(request.candidates), images_key(request)) for request in requests]
    return plan_batches(keys, [len(request.prompt) for request in requests], batch_size)


class Remembering:
    """A model that is asked batch by batch, each kept in an `AnswerLog` at once; as one of several, its share alone.

    Args:
        bundle: what answers.
        log: where the answers of all processes are.
    """

    def __init__(self, bundle: Answerer, log: AnswerLog) -> None:
        self.bundle, self.log, self.calls = bundle, log, 0

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 16,
        batch_size: int = 16,
        contrast: tuple[str, str] | None = None,
        on_batch: Callable[[Pairs], None] | None = None,
    ) -> list[Answer]:
        """Answers of all processes in the order of the requests; as `Answerer.answer`.

        Raises: DataError D107 before the model is asked; EnvironmentFault E401 out of memory; EvalError V604 where
        the processes do not see each other's answers.
        """
        import torch

        from vlmpeft.decode import exchange_of

        for request in requests:
            exchange_of(request)
        team, call = self.log.team, self.calls
        self.calls += 1
        batches = batches_of(requests, batch_size)
        team.wait()  # until the main process has made the folder ready
        known = {batch: pairs for (of, batch), pairs in self.log.read().items() if of == call}
        team.wait()  # until all know what is left, before anybody adds to it
        report = on_batch or (lambda pairs: None)
        for pairs in known.values():
            report(pairs)
        for batch in [b for b in range(len(batches)) if b not in known][team.rank :: team.size]:
            asked = [requests[i] for i in batches[batch]]
            try:
                found = self.bundle.answer(
                    asked, max_new_tokens=max_new_tokens, batch_size=batch_size, contrast=contrast
                )
            except torch.OutOfMemoryError as error:
                message = f"out of memory in a batch of {len(asked)} questions: {str(error).splitlines()[0]}"
                raise EnvironmentFault("E401", message, "lower batch_size; overwrite=true then starts anew.") from error
            known[batch] = list(zip(batches[batch], found, strict=True))
            self.log.add(call, batch, known[batch])
            report(known[batch])
        if team.size > 1:
            self._gather(call, batches, known, report)
        by_index = dict(pair for pairs in known.values() for pair in pairs)
        return [by_index[i] for i in range(len(requests))]

    def _gather(
        self, call: int, batches: list[list[int]], known: dict[int, Pairs], report: Callable[[Pairs], None]
    ) -> None:
        """Add what the other processes found."""
        self.log.team.wait()
        others = {batch: pairs for (of, batch), pairs in self.log.read().items() if of == call and batch not in known}
        for pairs in others.values():
            report(pairs)
        known |= others
        missing = len(batches) - len(known)
        if missing:
            message = f"{missing} of {len(batches)} batches were answered by processes that write elsewhere."
            raise EvalError("V604", message, "give an out folder that all processes see.")

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        """As the model's."""
        return self.bundle.blank_image(image)
