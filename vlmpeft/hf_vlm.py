"""Any Hugging Face model that answers questions about images, asked as one of ours: `model=hf:DIR_OR_ID`.

Letters: b rows, s sequence, v vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmpeft.build import choose_device, choose_dtype
from vlmpeft.decode import Answer, OnBatch, Request, exchange_of
from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.hf_prompt import ChatPrompts
from vlmpeft.images import open_image, upright_rgb
from vlmpeft.likelihood import Likelihood
from vlmpeft.loglik import by_likelihood, kinds_of
from vlmpeft.sources import hub_or_cache, require_complete, resolve, unreachable


@dataclass(frozen=True)
class _Asked:
    """A request, its number among the requests, and its prompt."""

    index: int
    request: Request
    text: str


class HFModel:
    """A model of transformers and its processor, with the methods of a `Bundle` that ask.

    Args:
        model: made by AutoModelForImageTextToText, in eval mode.
        prompts: how questions are put to it.
    """

    def __init__(self, model: Any, prompts: ChatPrompts) -> None:
        self.model, self.prompts = model, prompts
        self.tokenizer = prompts.tokenizer

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        contrast: tuple[str, str] | None = None,
        on_batch: OnBatch | None = None,
    ) -> list[Answer]:
        """Greedy answers in the order of the requests; see `decode.answer`."""
        answers: dict[int, Answer] = {}

        def keep(pairs: list[tuple[int, Answer]]) -> None:
            answers.update(pairs)
            if on_batch:
                on_batch(pairs)

        for numbers in kinds_of(requests):
            asked = [self._asked(i, requests[i]) for i in numbers]
            for rows in _batches(asked, batch_size):
                if rows[0].request.candidates:
                    scored = self._choose(rows)
                    pairs = zip(rows, scored, strict=True)
                    keep([(row.index, by_likelihood(row.request, found, contrast)) for row, found in pairs])
                else:
                    keep(self._answers(rows, max_new_tokens, contrast))
        return [answers[i] for i in range(len(requests))]

    def _answers(
        self, rows: Sequence[_Asked], max_new_tokens: int, contrast: tuple[str, str] | None
    ) -> list[tuple[int, Answer]]:
        """Generated answers with the numbers of their requests."""
        tokens, logits = self._generate(rows, max_new_tokens)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        margins: list[float | None] = [None] * len(rows)
        if contrast is not None:
            first, second = (self.prompts.answered(rows[0].text, word)[1][0] for word in contrast)
            margins = (logits[:, first] - logits[:, second]).tolist()
        found = [Answer(text.strip(), margin) for text, margin in zip(texts, margins, strict=True)]
        return list(zip([row.index for row in rows], found, strict=True))

    def likelihoods(self, requests: Sequence[Request], *, batch_size: int = 8) -> list[tuple[Likelihood, ...]]:
        """How likely each candidate of each request is; see `likelihood.likelihoods`."""
        asked = [self._asked(i, request) for i, request in enumerate(requests)]
        found: dict[int, tuple[Likelihood, ...]] = {}
        for rows in _batches(asked, batch_size):
            found |= dict(zip([row.index for row in rows], self._choose(rows), strict=True))
        return [found[i] for i in range(len(requests))]

    def _choose(self, rows: Sequence[_Asked]) -> list[tuple[Likelihood, ...]]:
        """Likelihoods of the rows' candidates: as many rows a forward as there are questions."""
        pairs = [(row, text) for row in rows for text in row.request.candidates]
        made: list[Likelihood] = []
        for start in range(0, len(pairs), len(rows)):
            some = pairs[start : start + len(rows)]
            made += self._score([row for row, _ in some], [text for _, text in some])
        left = iter(made)
        return [tuple(next(left) for _ in row.request.candidates) for row in rows]

    def generate(self, images: Any, prompt: str, **options: Any) -> str:
        """As `Bundle.generate`."""
        return self.generate_batch([(images, prompt)], **options)[0]

    def generate_batch(self, requests: Sequence[tuple[Any, str]], **options: Any) -> list[str]:
        """As `Bundle.generate_batch`."""
        listed = [([] if i is None else i if isinstance(i, list | tuple) else [i], prompt) for i, prompt in requests]
        made = [Request(tuple(Path(i) if isinstance(i, str) else i for i in images), p) for images, p in listed]
        return [found.text for found in self.answer(made, **options)]

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        """A picture of the same size in the colour that the image processor centres on; grey where it names none."""
        mean = getattr(self.prompts.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        r, g, b = (int(255 * value) for value in mean)
        return Image.new("RGB", _opened(image).size, (r, g, b))

    def _asked(self, index: int, request: Request) -> _Asked:
        return _Asked(index, request, self.prompts.text(exchange_of(request).question))

    def _inputs(self, rows: Sequence[_Asked], texts: Sequence[str], side: str) -> Any:
        images = [[_opened(image) for image in row.request.images] for row in rows]
        return self.prompts.inputs(texts, images, side).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def _generate(self, rows: Sequence[_Asked], max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns: new tokens (b, new), logits (b, v) of the first of them in fp32."""
        from transformers import GenerationConfig

        inputs = self._inputs(rows, [row.text for row in rows], "left")
        own = self.model.generation_config
        stops = own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id
        plain = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        self.model.generation_config = GenerationConfig()
        try:  # `generate` fills in what we leave open from the model's own file: sampling, penalties, beams
            out = self.model.generate(**inputs, generation_config=plain)
        finally:
            self.model.generation_config = own
        return out.sequences[:, inputs["input_ids"].shape[1] :], out.logits[0].float()

    @torch.no_grad()
    def _score(self, rows: Sequence[_Asked], answers: Sequence[str]) -> list[Likelihood]:
        whole = [self.prompts.answered(row.text, text) for row, text in zip(rows, answers, strict=True)]
        if empty := [text for text, (_, ids) in zip(answers, whole, strict=True) if not ids]:
            raise ModelError("M518", f"the tokenizer has no token for the answer {empty[0]!r:.80}.")
        inputs = self._inputs(rows, [text for text, _ in whole], "right")
        ends = inputs["attention_mask"].sum(1).tolist()
        starts = [end - len(ids) for end, (_, ids) in zip(ends, whole, strict=True)]
        first = min(starts) - 1  # no logits where no answer is
        keep = {"logits_to_keep": inputs["input_ids"].shape[1] - first} if _keeps(self.model) else {}
        logits = self.model(**inputs, **keep).logits.float()
        logits = logits if keep else logits[:, first:]
        spans = list(zip(logits, inputs["input_ids"], starts, ends, strict=True))
        return [_likelihood(row[start - 1 - first : end - 1 - first], ids[start:end]) for row, ids, start, end in spans]


def load_hf(name: str, device: str = "auto", dtype: torch.dtype | None = None) -> HFModel:
    """Load a model of transformers for questions about images.

    Args: name: directory, hub id or `package:NAME/PATH`; device, dtype: as `vlmpeft.load`.
    Raises: EnvironmentFault E420 if it cannot be had; ModelError M519 for a model of text alone or a processor that
        cannot lay out a question, M547, M548 for damaged files.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    source, where = resolve(name), choose_device(device)
    kinds: Any = AutoModelForImageTextToText
    try:
        with hub_or_cache():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            if type(config) not in kinds._model_mapping:
                raise _no_images(name, f"it is a {config.model_type} model")
            processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
            if not hasattr(processor, "image_processor"):
                raise _no_images(name, "its folder holds no image processor")
            model, info = kinds.from_pretrained(
                source, dtype=dtype or choose_dtype("auto", where), output_loading_info=True, trust_remote_code=False
            )
    except ImportError as error:
        raise EnvironmentFault("E411", f"'{name}' needs another package: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error
    require_complete(name, info)
    return HFModel(model.to(where).requires_grad_(False).eval(), ChatPrompts(processor, name))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _no_images(name: str, reason: str) -> ModelError:
    fix = "give a model that AutoModelForImageTextToText loads, with its processor."
    return ModelError("M519", f"'{name}' answers no questions about images: {reason}.", fix)


def _batches(asked: Sequence[_Asked], batch_size: int) -> list[list[_Asked]]:
    """Longest prompts first; those with images apart from those without, which processors take in another form."""
    made = []
    for shown in (True, False):
        rows = sorted((a for a in asked if bool(a.request.images) == shown), key=lambda a: -len(a.text))
        made += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return made


def _opened(image: Path | Image.Image) -> Image.Image:
    return upright_rgb(image, Path("image")) if isinstance(image, Image.Image) else open_image(Path(image))


def _keeps(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _likelihood(logits: Tensor, ids: Tensor) -> Likelihood:
    """Args: logits (n, v) before each of the tokens ids (n,)."""
    chosen = logits.log_softmax(-1).gather(1, ids[:, None])
    return Likelihood(float(chosen.sum()), len(ids), bool((logits.argmax(-1) == ids).all()))
