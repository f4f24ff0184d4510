"""Questions to answers: batched greedy generation with left padding and a KV cache. Letters: b batch, s sequence, v vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmpeft.batch import IMAGE_TOKEN_ID, collate
from vlmpeft.errors import DataError, ModelError
from vlmpeft.images import ImageTransform, open_image, to_rgb
from vlmpeft.routing import routing_of
from vlmpeft.template import IMAGE, Encoding, Exchange, ImageSlot, TurnEncoder, parse_question
from vlmpeft.vlm import VLM


@dataclass(frozen=True)
class Request:
    """A question about images. A prompt without `<image>` marks gets one in front for each image."""

    images: tuple[Path | Image.Image, ...]
    prompt: str


@dataclass(frozen=True)
class Answer:
    """text: stripped. margin: logit of the first contrast word minus that of the second, at the first answer position."""

    text: str
    margin: float | None = None


OnBatch = Callable[[list[tuple[int, Answer]]], None]


def exchange_of(request: Request) -> Exchange:
    """A request as a question. Raises: DataError D107 if marks and images differ in number."""
    question = parse_question(request.prompt)
    marks = sum(isinstance(c, ImageSlot) for c in question)
    if marks == 0 and request.images:
        question = (*(IMAGE for _ in request.images), "\n" + request.prompt)
    elif marks != len(request.images):
        raise DataError("D107", f"{len(request.images)} images but {marks} <image> in the prompt.", "write one <image> for each image, or none.")
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
    """Answer requests greedily, longest prompts first, in batches.

    Args:
        contrast: two words whose first tokens give `Answer.margin`.
        on_batch: called with (index, answer) pairs after each batch.

    Returns: answers in the order of `requests`; the same texts as one by one.
    """
    encodings = [encoder.encode([exchange_of(r)]) for r in requests]
    order = sorted(range(len(requests)), key=lambda i: -len(encodings[i].input_ids))
    answers: dict[int, Answer] = {}
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        images = [transform(_pil(image)) for i in chosen for image in requests[i].images]
        found = _generate(model, encoder.tokenizer, [encodings[i] for i in chosen], images, max_new_tokens, contrast, _stops(encoder))
        answers |= dict(zip(chosen, found, strict=True))
        if on_batch:
            on_batch(list(zip(chosen, found, strict=True)))
    return [answers[i] for i in range(len(requests))]


def _pil(image: Path | Image.Image) -> Image.Image:
    return to_rgb(image, Path("image")) if isinstance(image, Image.Image) else open_image(Path(image))


def _stops(encoder: TurnEncoder) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos and the first token of the template's end."""
    ends = [s for s in encoder.template.segments([Exchange(("q",), "a")], None) if s.kind == "end"]
    return sorted({encoder.tokenizer.eos_token_id, *(encoder.segment_ids(s)[0] for s in ends)})


@torch.inference_mode()
def _generate(
    model: VLM, tokenizer: Any, encodings: list[Encoding], images: list[Tensor], max_new_tokens: int, contrast: tuple[str, str] | None, stops: list[int]
) -> list[Answer]:
    device = model.language.get_input_embeddings().weight.device
    batch = collate(encodings, images, side="left").to(device)
    routing = routing_of(batch.input_ids, batch.attention_mask, None, IMAGE_TOKEN_ID)
    out = model.language.generate(
        inputs_embeds=model.embed(batch.input_ids, routing.visual, batch.pixel_values),
        attention_mask=batch.attention_mask.long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=stops,
        pad_token_id=stops[0],
        return_dict_in_generate=True,
        output_logits=contrast is not None,
    )
    texts = tokenizer.batch_decode(out.sequences, skip_special_tokens=True)  # only the new tokens: the prompt came as embeddings
    margins: list[float | None] = [None] * len(texts)
    if contrast is not None:
        first, second = (_first_token(tokenizer, word) for word in contrast)
        logits = out.logits[0].float()  # (b, v), at the first answer position
        margins = list((logits[:, first] - logits[:, second]).tolist())
    return [Answer(text.strip(), margin) for text, margin in zip(texts, margins, strict=True)]


def _first_token(tokenizer: Any, word: str) -> int:
    ids: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError("M514", f"the tokenizer has no token for '{word}'.")
    return ids[0]
