"""Questions to answers: batched greedy generation with left padding and a KV cache. Letters: b rows, v vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmpeft.batch import collate
from vlmpeft.errors import DataError, ModelError
from vlmpeft.images import ImageReader, ImageTransform
from vlmpeft.language import decoder_of
from vlmpeft.prefix import can_share, generate_shared, shared_length
from vlmpeft.routed import generating
from vlmpeft.routing import adapter_of_rows, chosen_rows
from vlmpeft.template import IMAGE, Encoding, Exchange, ImageSlot, TurnEncoder, parse_question
from vlmpeft.vlm import VLM


@dataclass(frozen=True)
class Request:
    """A question about images. A prompt without `<image>` marks gets one in front for each image.

    candidates: answers to choose the likeliest of, instead of generating one; see `loglik.likeliest`.
    per_character: divide each log-likelihood by its candidate's length first.
    """

    images: tuple[Path | Image.Image, ...]
    prompt: str
    candidates: tuple[str, ...] = ()
    per_character: bool = False


@dataclass(frozen=True)
class Answer:
    """text: stripped. margin: logit of the first contrast word minus the second's, at the first answer position.

    logliks: log-likelihood of each of the request's candidates, if it has some.
    """

    text: str
    margin: float | None = None
    logliks: tuple[float, ...] | None = None


OnBatch = Callable[[list[tuple[int, Answer]]], None]


def exchange_of(request: Request) -> Exchange:
    """A request as a question. Raises: DataError D107 if marks and images differ in number."""
    question = parse_question(request.prompt)
    marks = sum(isinstance(c, ImageSlot) for c in question)
    if marks == 0 and request.images:
        question = (*(IMAGE for _ in request.images), "\n" + "".join(c for c in question if isinstance(c, str)).strip())
    elif marks != len(request.images):
        counts = f"{len(request.images)} images but {marks} <image> in the prompt."
        raise DataError("D107", counts, "write one <image> for each image, or none.")
    return Exchange(question)


def answer(
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
    """Answer requests greedily, longest prompts first, in batches; questions about the same images go together.

    Args:
        contrast: two words whose first tokens give `Answer.margin`.
        on_batch: called with (index, answer) pairs after each batch.

    Returns: answers in the order of `requests`; the same texts as one by one.
    """
    read = ImageReader(transform)
    asked = [
        _Asked(r, encoder.encode([exchange_of(r)], tilings=[read.tiling(i) for i in r.images]), adapter)
        for r, adapter in zip(requests, adapters_of(len(requests)), strict=True)
    ]
    words = None if contrast is None else tuple(_first_token(encoder, word) for word in contrast)
    stops = stop_tokens(encoder)
    answers: dict[int, Answer] = {}
    settle(model)
    for chosen in plan_batches([item.key for item in asked], [item.length for item in asked], batch_size):
        rows = [asked[i] for i in chosen]
        with chosen_rows(chosen):
            tokens, logits = _generate(model, read, rows, max_new_tokens, stops)
        margins = [None] * len(rows) if words is None else (logits[:, words[0]] - logits[:, words[1]]).tolist()
        texts = [_text(encoder.tokenizer, row, stops) for row in tokens.tolist()]
        found = [Answer(text, margin) for text, margin in zip(texts, margins, strict=True)]
        answers |= dict(zip(chosen, found, strict=True))
        if on_batch:
            on_batch(list(zip(chosen, found, strict=True)))
    return [answers[i] for i in range(len(requests))]


def settle(model: VLM) -> None:
    """`model.eval()` unless it holds already: it sets every module anew, which a batch of few tokens would feel."""
    if any(module.training for module in model.modules()):
        model.eval()


def adapters_of(requests: int) -> list[int | None]:
    """The adapter of every request, if `rows_with` gives them. Raises: ModelError M592 for another number of them."""
    adapter = adapter_of_rows()
    if adapter is None:
        return [None] * requests
    if len(adapter) != requests:
        message = f"adapters for {len(adapter)} rows, but {requests} requests."
        raise ModelError("M592", message, "name an adapter, or None, for every request.")
    return list(adapter.tolist())


class _Asked:
    """A request, its encoding, and the key that requests with the same images, beginning and adapter have in common."""

    def __init__(self, request: Request, encoding: Encoding, adapter: int | None) -> None:
        self.request, self.encoding = request, encoding
        self.shared = shared_length(encoding)
        self.key = (images_key(request), tuple(encoding.input_ids[: self.shared]), adapter)

    @property
    def length(self) -> int:
        return len(self.encoding.input_ids)


def images_key(request: Request) -> tuple[str | int, ...]:
    """Equal for requests about the same images, in this order: files by name, pictures by identity."""
    return tuple(id(image) if isinstance(image, Image.Image) else str(image) for image in request.images)


def plan_batches(keys: Sequence[Hashable], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches, in the order of `together`.

    A batch ends early, by a quarter at most, rather than with a part of a group whose images would be read twice.
    """
    made: list[list[int]] = [[]]
    for _, members in itertools.groupby(together(keys, lengths), key=lambda i: keys[i]):
        group = list(members)
        room = batch_size - len(made[-1])
        if room < len(group) <= batch_size and 4 * room <= batch_size:
            made.append([])
        for i in group:
            if len(made[-1]) == batch_size:
                made.append([])
            made[-1].append(i)
    return [batch for batch in made if batch]


def together(keys: Sequence[Hashable], lengths: Sequence[int]) -> list[int]:
    """Indices in the order of batches: groups of one key by their longest member, then the longest first."""
    longest: dict[Hashable, int] = {}
    for key, length in zip(keys, lengths, strict=True):
        longest[key] = max(longest.get(key, 0), length)
    rank = {key: i for i, key in enumerate(longest)}
    return sorted(range(len(keys)), key=lambda i: (-longest[keys[i]], rank[keys[i]], -lengths[i]))


def stop_tokens(encoder: TurnEncoder) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos and the last token of the template's end."""
    ends = [s for s in encoder.template.segments([Exchange(("q",), "a")], None) if s.kind == "end"]
    return sorted({encoder.tokenizer.eos_token_id, *(encoder.segment_ids(s)[-1] for s in ends)})


@torch.no_grad()  # not inference_mode: what a model caches of it could not be used in training again
def _generate(
    model: VLM, read: ImageReader, rows: Sequence[_Asked], max_new_tokens: int, stops: list[int]
) -> tuple[Tensor, Tensor]:
    """Continue rows greedily. Returns: new tokens (b, new), logits (b, v) of the first of them in fp32."""
    encodings, keys = [row.encoding for row in rows], [row.key for row in rows]
    first_of = {row.key: row.request for row in reversed(rows)}
    longest = max(row.length for row in rows) + max_new_tokens
    worth = (
        len(first_of) < len(rows) and any(row.shared for row in rows) and all(row.shared < row.length for row in rows)
    )
    if worth and can_share(model.language, longest):
        views = [view for key in dict.fromkeys(keys) for image in first_of[key].images for view in read(image)]
        tokens, logits = generate_shared(model, encodings, keys, views, max_new_tokens, stops)
        return tokens, logits.float()
    views_of = {key: [v for image in request.images for v in read(image)] for key, request in first_of.items()}
    return generate_each(model, encodings, [view for key in keys for view in views_of[key]], max_new_tokens, stops)


def generate_each(
    model: VLM, encodings: Sequence[Encoding], views: Sequence[Tensor], max_new_tokens: int, stops: list[int]
) -> tuple[Tensor, Tensor]:
    """As `_generate`, through the language model's own `generate`, which every architecture has."""
    from transformers import GenerationConfig

    batch = collate(encodings, views, side="left").to(model.language.get_input_embeddings().weight.device)
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0],
        return_dict_in_generate=True,
        output_logits=True,
    )
    routing, embeddings = model.embed_batch(batch)
    own, model.language.generation_config = model.language.generation_config, GenerationConfig()
    try:  # `generate` fills in what we leave open from the model's own file: sampling, penalties, beams
        with generating(decoder_of(model.language), routing):
            out = model.language.generate(
                inputs_embeds=embeddings, attention_mask=batch.attention_mask.long(), generation_config=plain
            )
    finally:
        model.language.generation_config = own
    return out.sequences, out.logits[0].float()  # only the new tokens: the prompt came as embeddings


def _text(tokenizer: Any, tokens: Sequence[int], stops: Sequence[int]) -> str:
    """Tokens up to the first stop, as stripped text."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    text: str = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return text.strip()


def _first_token(encoder: TurnEncoder, word: str) -> int:
    """The token an answer that starts with `word` starts with, in the encoder's template."""
    segments = encoder.template.segments([Exchange(("q",), word)], None)
    ids = next((encoder.segment_ids(s) for s in segments if s.kind == "answer"), ())
    if not ids:
        raise ModelError("M518", f"the tokenizer has no token for '{word}'.")
    return ids[0]
