"""What the language model still knows: text alone, through the model as it is trained, before and after.

Two measures, without an image. Perplexity: exp of the mean negative log-likelihood per token of plain texts. Multiple
choice: of some answers to a question, the one with the highest log-likelihood per character is chosen, the
length normalisation of EleutherAI's lm-evaluation-harness (`acc_norm`), and so is the prompt without examples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vlmpeft import fs
from vlmpeft.batch import IGNORE, collate
from vlmpeft.build import Bundle
from vlmpeft.errors import EvalError
from vlmpeft.eval.runner import read_rows
from vlmpeft.recipe import RetentionConfig
from vlmpeft.template import Encoding

RESULTS = "retention.json"
BUILTIN = "builtin"
MOMENTS = ("before", "after")
PROMPT = "Question: {}\nAnswer:"  # as the harness asks ARC


@dataclass(frozen=True)
class Choice:
    """A question and its answers, the right one by its index."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Retained:
    """A retention set; either part may be empty, not both."""

    texts: tuple[str, ...]
    questions: tuple[Choice, ...]


def read_retention(config: RetentionConfig) -> Retained | None:
    """Read and check the set before a model loads; None where none is asked for.

    Raises: EvalError V610 for a file with a row that is neither {"text"} nor {"question", "choices", "answer"};
        and as `read_rows`.
    """
    if config.data is None:
        return None
    builtin = Path(__file__).parent / "recipes" / "retention.jsonl"
    path = builtin if config.data == BUILTIN else Path(config.data)
    texts, questions = [], []
    for number, row in enumerate(read_rows(path), start=1):
        choice = _choice(row)
        if choice is not None:
            questions.append(choice)
        elif isinstance(row.get("text"), str) and row["text"].strip():
            texts.append(row["text"])
        else:
            message = f"{path} row {number} is neither a text nor a question with choices."
            fix = 'write {"text": ...} or {"question": ..., "choices": [...], "answer": index of the right one}.'
            raise EvalError("V610", message, fix)
    return Retained(tuple(texts), tuple(questions))


def _choice(row: dict[str, Any]) -> Choice | None:
    """A row as a question; None if it is none. The answer is an index from 0, or one of the choices."""
    question, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
    if not (isinstance(question, str) and isinstance(choices, list) and len(choices) > 1):
        return None
    if not all(isinstance(c, str) and c.strip() for c in choices):
        return None
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return None
    return Choice(question, tuple(choices), answer)


def evaluate(bundle: Bundle, retained: Retained, batch_size: int) -> dict[str, float | int]:
    """Returns: "perplexity", "texts", "tokens" and "accuracy", "questions", as far as the set has them."""
    results: dict[str, float | int] = {}
    if retained.texts:
        results |= _perplexity(bundle, retained.texts, batch_size)
    if retained.questions:
        results |= _accuracy(bundle, retained.questions, batch_size)
    return results


def _perplexity(bundle: Bundle, texts: Sequence[str], batch_size: int) -> dict[str, float | int]:
    """Over all tokens of all texts but the first of each, which nothing predicts; a text is cut at data.max_length."""
    rows = [bundle.tokenizer(text)["input_ids"][: bundle.recipe.data.max_length] for text in texts]
    encodings = [_encoding(ids, 1) for ids in rows if len(ids) > 1]
    tokens = sum(encoding.num_supervised for encoding in encodings)
    if not tokens:
        raise EvalError("V610", "the retention texts are of one token each.", "give longer texts.")
    nll = -sum(log_likelihoods(bundle, encodings, batch_size))
    return {"perplexity": math.exp(min(nll / tokens, 700.0)), "texts": len(texts), "tokens": tokens}


def _accuracy(bundle: Bundle, questions: Sequence[Choice], batch_size: int) -> dict[str, float | int]:
    encodings, lengths = [], []
    for question in questions:
        prompt = PROMPT.format(question.question)
        start = len(bundle.tokenizer(prompt)["input_ids"])
        for choice in question.choices:
            encodings.append(_encoding(bundle.tokenizer(f"{prompt} {choice}")["input_ids"], start))
            lengths.append(len(choice))
    scores = [v / n for v, n in zip(log_likelihoods(bundle, encodings, batch_size), lengths, strict=True)]
    right, at = 0, 0
    for question in questions:
        own = scores[at : at + len(question.choices)]
        right += own.index(max(own)) == question.answer
        at += len(own)
    return {"accuracy": right / len(questions), "questions": len(questions)}


def _encoding(ids: Sequence[int], start: int) -> Encoding:
    """Ids of which those from `start` on are scored."""
    return Encoding(list(ids), [IGNORE] * start + list(ids[start:]), [0] * len(ids))


@torch.no_grad()
def log_likelihoods(bundle: Bundle, encodings: Sequence[Encoding], batch_size: int) -> list[float]:
    """Summed log-likelihood of each row's labels, in the order given; rows of like length are run together."""
    model = bundle.model.eval()
    device = model.language.get_input_embeddings().weight.device
    found = [0.0] * len(encodings)
    order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i].input_ids))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = collate([encodings[i] for i in chosen]).to(device)
        inputs = batch.tensors()
        logits = model(**inputs).logits.float()  # (m, vocabulary)
        targets = batch.labels.flatten()[inputs["supervised"] + 1]
        scores = -F.cross_entropy(logits, targets, reduction="none")
        rows = torch.div(inputs["supervised"], batch.labels.shape[1], rounding_mode="floor")
        sums = torch.zeros(len(chosen), device=device, dtype=torch.float64).index_add_(0, rows, scores.double())
        for i, value in zip(chosen, sums.tolist(), strict=True):
            found[i] = value
    return found


def read(run_dir: Path) -> dict[str, dict[str, float | int]]:
    """Results kept so far, by moment ("before", "after")."""
    path = run_dir / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def keep(run_dir: Path, moment: str, results: dict[str, float | int]) -> None:
    """Add the results of a moment to `retention.json`."""
    fs.write_json(run_dir / RESULTS, {**read(run_dir), moment: results})


def headline(run_dir: Path) -> str:
    """The results as lines for people, "" without any."""
    found = read(run_dir)
    moments = {moment: found[moment] for moment in MOMENTS if moment in found}
    lines = []
    for key, name, form in (("perplexity", "perplexity", "{:.3f}"), ("accuracy", "multiple choice", "{:.1%}")):
        parts = [f"{moment} {form.format(values[key])}" for moment, values in moments.items() if key in values]
        lines += [f"retention, {name}: {', '.join(parts)}\n"] if parts else []
    return "".join(lines)
