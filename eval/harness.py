"""Our models inside lmms-eval, where both are installed.

  python -m lmms_eval --model vlmpeft --model_args pretrained=DIR --batch_size 16 --tasks pope,mmmu_val
lmms-eval finds `manifest` through the entry point group `lmms_eval.models`. `pretrained` is what `model=` is to our own
commands: a model directory, or hf:DIR_OR_ID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from vlmpeft.errors import ConfigError, EvalError, nearest
from vlmpeft.eval.model import open_model

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

    from vlmpeft.decode import Request
    from vlmpeft.likelihood import Likelihood

NEW_TOKENS = 16  # where a task does not say
WINDOW = 16  # batches whose pictures are in memory at once
MARK = "<image>"
IDLE = {"top_p", "top_k", "min_p", "seed", "length_penalty", "early_stopping", "use_cache"}  # no word when greedy
IDLE |= {"image_aspect_ratio"}  # a model sees pictures as it was trained to
PLAIN: dict[str, tuple[Any, ...]] = {  # the values that greedy decoding has
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1, 1.0, None),
    "no_repeat_ngram_size": (0, None),
}
KNOWN = {"max_new_tokens", "until", "do_sample", "temperature", *IDLE, *PLAIN}


def manifest() -> ModelManifest:
    """What lmms-eval registers: it asks while it imports its own models, so those are imported here."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlmpeft", simple_class_path="vlmpeft.eval.harness.Vlmpeft")


class Vlmpeft(lmms):
    """A model of ours as lmms-eval asks it, greedily and in batches.

    Args:
        pretrained: as `model=` of our commands.
        device: "auto" takes an accelerator if there is one.
        batch_size: questions in a forward; "auto" is 16.
        max_batch_size: as lmms-eval passes it; not used.
        likelihood: loss of an answer for multiple choice: "mean" over its tokens, as lmms-eval's own LLaVA gives,
            or "sum", the negative log-probability of the whole answer.

    Raises: ConfigError C102; and as `open_model`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        likelihood: str = "mean",
    ) -> None:
        super().__init__()
        if likelihood not in ("mean", "sum"):
            raise ConfigError("C102", f"likelihood={likelihood}: no such loss.", "choose mean or sum.")
        self.likelihood, self.batch_size = likelihood, 16 if batch_size == "auto" else int(batch_size)
        self.answerer = open_model(str(pretrained), device)  # no nn.Module: `clean` deletes those after a run

    @property
    def device(self) -> Any:
        """Where the weights are: lmms-eval's collectives ask for it."""
        return next(self.answerer.model.parameters()).device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests. Raises: ConfigError C102 for a setting that is not greedy."""
        asked = [(*generation(request.args[1]), request) for request in requests]
        texts: dict[int, str] = {}
        for length in dict.fromkeys(length for length, _, _ in asked):
            chosen = [i for i, (tokens, _, _) in enumerate(asked) if tokens == length]
            for window in self._windows(chosen):
                made = self._requests([asked[i][2] for i in window])
                found = self.answerer.answer(made, max_new_tokens=length, batch_size=self.batch_size)
                texts |= {i: before(asked[i][1], a.text) for i, a in zip(window, found, strict=True)}
        return [texts[i] for i in range(len(asked))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(loss, greedy) of every given answer: lmms-eval takes the smallest loss, and only inside this wrapper."""
        results: dict[int, GenerationResult] = {}
        for window in self._windows(range(len(requests))):
            made = self._requests([requests[i] for i in window])
            same: dict[Any, list[int]] = {}  # the answers to one question are scored together
            for i, request in zip(window, made, strict=True):
                same.setdefault((tuple(map(id, request.images)), request.prompt), []).append(i)
            first = dict(zip(window, made, strict=True))
            texts = {i: self._continuation(requests[i]) for i in window}
            asked = [replace(first[g[0]], candidates=tuple(texts[i] for i in g)) for g in same.values()]
            found = self.answerer.likelihoods(asked, batch_size=self.batch_size)
            for group, answers in zip(same.values(), found, strict=True):
                results |= {i: self._loss(answer) for i, answer in zip(group, answers, strict=True)}
        return [results[i] for i in range(len(requests))]

    def _loss(self, answer: Likelihood) -> GenerationResult:
        parts = answer.tokens if self.likelihood == "mean" else 1
        return GenerationResult(text=(-answer.log_probability / parts, answer.greedy))

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: a round would have to be asked with the answers before it."""
        raise NotImplementedError("vlmpeft answers tasks of one round; choose tasks of type generate_until.")

    def _windows(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        size = WINDOW * self.batch_size
        with tqdm(total=len(numbers), unit="request", disable=self.rank != 0, mininterval=1.0) as bar:
            for start in range(0, len(numbers), size):
                yield numbers[start : start + size]
                bar.update(len(numbers[start : start + size]))

    def _requests(self, requests: Sequence[Instance]) -> list[Request]:
        """Requests with their pictures; equal pictures are one object, so that their questions are read together."""
        from vlmpeft.decode import Request

        same: dict[bytes, Any] = {}
        made = []
        for request in requests:
            pictures = [same.setdefault(_digest(p), p) for p in self._pictures(request)]
            made.append(Request(tuple(pictures), prompt(str(request.args[0]), len(pictures))))
        return made

    def _pictures(self, request: Instance) -> list[Any]:
        from PIL import Image

        if len(request.args) < 6 or not callable(request.args[2]):  # an unconditional likelihood has no document
            return []
        found = request.args[2](self._document(request))
        pictures = found if isinstance(found, list | tuple) else [] if found is None else [found]
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                kind = type(picture).__name__
                message = f"task {request.args[4]}, document {request.args[3]}: shows a {kind}, not an image."
                raise EvalError("V602", message, "choose tasks with images.")
        return list(pictures)

    def _document(self, request: Instance) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _continuation(self, request: Instance) -> str:
        """The given answer without the space that lmms-eval puts in front: the template puts its own."""
        given: str | Callable[[Any], Any] = request.args[1]
        return str(given(self._document(request)) if callable(given) else given).strip()


def generation(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The most new tokens and the texts that end an answer, of a task's `generation_kwargs`.

    Raises: ConfigError C102 for sampling, beams, penalties and settings nobody knows.
    """
    for key in settings:
        if key not in KNOWN:
            raise ConfigError("C102", f"generation setting '{key}' is not known{nearest(key, KNOWN)}")
    temperature = settings.get("temperature")
    if settings.get("do_sample", temperature not in (0, None)) and temperature != 0:
        sampling = ", ".join(f"{key}={settings[key]}" for key in ("do_sample", "temperature") if key in settings)
        fix = "add --gen_kwargs do_sample=false,temperature=0."
        raise ConfigError("C102", f"the task samples ({sampling}), but vlmpeft answers greedily.", fix)
    for key, values in PLAIN.items():
        if key in settings and settings[key] not in values:
            fix = f"add --gen_kwargs {key}={values[0]}."
            raise ConfigError("C102", f"the task sets {key}={settings[key]}, but vlmpeft decodes greedily.", fix)
    until = settings.get("until") or ()
    ends = (until,) if isinstance(until, str) else tuple(until)
    return int(settings.get("max_new_tokens") or NEW_TOKENS), tuple(end for end in ends if end)


def before(ends: Sequence[str], text: str) -> str:
    """The stripped text up to the first of the ends."""
    places = [place for end in ends if (place := text.find(end)) >= 0]
    return text[: min(places, default=len(text))].strip()


def prompt(context: str, pictures: int) -> str:
    r"""A task's text: its `<image>` marks stand for the pictures if they are as many, else they are literal text."""
    marks = context.count(MARK)
    return context if marks == pictures else context.replace(MARK, rf"\{MARK}")


def _digest(picture: Any) -> bytes:
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).digest()
