"""Which of some given answers is the likeliest, by `likelihood`; nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmpeft.decode import Answer, OnBatch, Request, adapters_of, answer
from vlmpeft.images import ImageTransform
from vlmpeft.likelihood import Likelihood, likelihoods
from vlmpeft.routing import chosen_rows
from vlmpeft.template import TurnEncoder
from vlmpeft.vlm import VLM


def answer_each(
    model: VLM,
    encoder: TurnEncoder,
    transform: ImageTransform,
    requests: Sequence[Request],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    contrast: tuple[str, str] | None = None,
    on_batch: OnBatch | None = None,
) -> list[Answer]:
    """Requests with candidates by `likeliest`, all others by `decode.answer`. Returns: answers in their order."""
    answers: dict[int, Answer] = {}
    options: dict[str, Any] = {"batch_size": batch_size, "contrast": contrast}
    adapters_of(len(requests))
    for numbers in kinds_of(requests):

        def keep(pairs: Sequence[tuple[int, Answer]], numbers: Sequence[int] = numbers) -> None:
            answers.update(found := [(numbers[i], answer) for i, answer in pairs])
            if on_batch:
                on_batch(found)

        asked = [requests[i] for i in numbers]
        with chosen_rows(numbers):
            if asked[0].candidates:
                likeliest(model, encoder, transform, asked, **options, on_batch=keep)
            else:
                answer(model, encoder, transform, asked, max_new_tokens=max_new_tokens, **options, on_batch=keep)
    return [answers[i] for i in range(len(requests))]


def kinds_of(requests: Sequence[Request]) -> list[list[int]]:
    """Numbers of the requests without candidates and of those with, as far as there are such."""
    kinds = [[i for i, r in enumerate(requests) if bool(r.candidates) is kind] for kind in (False, True)]
    return [numbers for numbers in kinds if numbers]


def likeliest(
    model: VLM,
    encoder: TurnEncoder,
    transform: ImageTransform,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    contrast: tuple[str, str] | None = None,
    on_batch: OnBatch | None = None,
) -> list[Answer]:
    """Answer each request by the likeliest of its candidates, the first of equals.

    Args:
        requests: with two candidates or more; `per_character` divides each log-likelihood by the candidate's length in
            characters before they are compared, as `acc_norm` of EleutherAI's lm-evaluation-harness does.
        batch_size: rows of a forward, unless one request has more; questions about the same images go together.
        contrast: two candidates; `Answer.margin` is the first's log-likelihood minus the second's, which for single
            tokens is the difference of their logits.

    Returns: answers in the order of the requests, with the log-likelihood of every candidate in `logliks`.
    Raises: ModelError M518 for a candidate without tokens.
    """
    answers: dict[int, Answer] = {}

    def keep(numbers: list[int], scored: list[tuple[Likelihood, ...]]) -> None:
        found = [by_likelihood(requests[i], likely, contrast) for i, likely in zip(numbers, scored, strict=True)]
        answers.update(pairs := list(zip(numbers, found, strict=True)))
        if on_batch:
            on_batch(pairs)

    likelihoods(model, encoder, transform, requests, batch_size=batch_size, on_batch=keep)
    return [answers[number] for number in range(len(requests))]


def by_likelihood(request: Request, found: Sequence[Likelihood], contrast: tuple[str, str] | None) -> Answer:
    """The answer that the likelihoods of a request's candidates give. Args: contrast: as for `likeliest`."""
    values = tuple(likelihood.log_probability for likelihood in found)
    lengths = [len(text) if request.per_character else 1 for text in request.candidates]
    scores = [value / length for value, length in zip(values, lengths, strict=True)]
    margin = None
    if contrast is not None and set(contrast) <= set(request.candidates):
        first, second = (values[request.candidates.index(word)] for word in contrast)
        margin = first - second
    return Answer(request.candidates[scores.index(max(scores))], margin, values)
