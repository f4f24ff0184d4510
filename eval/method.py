"""How an answer comes about: generated, or as the likeliest of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmpeft.errors import ConfigError, EvalError, nearest

if TYPE_CHECKING:
    from vlmpeft.decode import Answer

METHODS = ("generate", "loglik", "loglik_norm")
YES_NO = ("Yes", "No")


def check_method(name: str) -> None:
    """Raises: ConfigError C102 unless `name` is one of METHODS."""
    if name not in METHODS:
        raise ConfigError("C102", f"no method '{name}'{nearest(name, METHODS)}")


def candidates_of(method: str, candidates: Sequence[str]) -> dict[str, Any]:
    """What a `Request` about a question with these possible answers is told besides it.

    method: `generate` lets the model say what it will. `loglik` takes the candidate c with the largest sum over its
    tokens of log p(token | prompt, tokens of c before it), `loglik_norm` that sum divided by the characters of c, as
    `acc_norm` of EleutherAI's lm-evaluation-harness; the first of equals. A question without candidates is generated.
    """
    check_method(method)
    if method == "generate" or not candidates:
        return {}
    return {"candidates": tuple(candidates), "per_character": method == "loglik_norm"}


def logliks_of(answer: Answer, candidates: Sequence[str], question_id: object) -> Mapping[str, Any]:
    """`{"logliks": {candidate: value}}` for an answer's row; {} for one that was generated.

    Raises: EvalError V605 for a model that was given candidates and generated nevertheless.
    """
    if not candidates:
        return {}
    if answer.logliks is None:
        message = f"question {question_id}: this model gives no likelihoods."
        raise EvalError("V605", message, "set method=generate.")
    return {"logliks": dict(zip(candidates, answer.logliks, strict=True))}
