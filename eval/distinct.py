"""Equal questions about the same images are asked once: POPE's three files have their positive ones in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmpeft.decode import Answer, Request
    from vlmpeft.eval.runner import Answerer

OnBatch = Callable[[Sequence[tuple[int, "Answer"]]], None]


def answer_distinct(
    bundle: Answerer, requests: Sequence[Request], *, on_batch: OnBatch | None = None, **options: Any
) -> list[Answer]:
    """As `Answerer.answer`: a greedy answer depends on the request alone, so equal ones share it."""
    from vlmpeft.decode import images_key

    numbers: dict[Any, list[int]] = {}
    for i, request in enumerate(requests):
        key = (images_key(request), request.prompt, request.candidates, request.per_character)
        numbers.setdefault(key, []).append(i)
    groups = list(numbers.values())

    def spread(pairs: Sequence[tuple[int, Answer]]) -> None:
        if on_batch is not None:
            on_batch([(i, answer) for number, answer in pairs for i in groups[number]])

    found = bundle.answer([requests[group[0]] for group in groups], on_batch=spread, **options)
    answers = {i: answer for group, answer in zip(groups, found, strict=True) for i in group}
    return [answers[i] for i in range(len(requests))]
