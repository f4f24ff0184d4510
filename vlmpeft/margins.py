"""Yes or no by likelihood: every question about an image in one forward, no token generated.

The questions of an image share its tokens and see nothing of each other (`turns: independent`), so the margin of each,
logit(Yes) - logit(No) where its answer starts, is that of the question asked alone, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmpeft.batch import IGNORE, collate
from vlmpeft.build import Bundle
from vlmpeft.decode import Request, exchange_of
from vlmpeft.errors import ModelError, NumericError
from vlmpeft.eval.paths import resolve_images
from vlmpeft.images import ImageReader
from vlmpeft.language import hidden_states, logits_of, takes_positions
from vlmpeft.routed import routed
from vlmpeft.routing import position_ids, turn_mask
from vlmpeft.template import Encoding, Exchange

WORDS = ("Yes", "No")
Question = Mapping[str, Any]


class YesNo:
    """Questions about images, encoded once for a model and asked as often as needed.

    Args:
        questions: rows with `image`, a file below `folder`, and `text`.
        load: image file -> pixels (v, 3, h, w) or features (v, n, d) of its v views.
        suffix: appended to each question that does not already end in it.

    Raises: DataError D103, D120 for an image; ModelError M518 if one token begins both words.
    """

    def __init__(
        self,
        bundle: Bundle,
        questions: Sequence[Question],
        folder: str | Path,
        load: Callable[[Path], Tensor],
        suffix: str = "",
    ) -> None:
        self.load, self.count = load, len(questions)
        self.groups: list[tuple[Path, list[int], Encoding]] = []  # of one forward row: image, question numbers, ids
        encoder = bundle.turn_encoder()
        self.words = [_first(encoder.encode([Exchange(("q",), word)])) for word in WORDS]
        if self.words[0] == self.words[1]:
            raise ModelError("M518", "the tokenizer starts Yes and No with the same token.", "use another tokenizer.")
        tiling = ImageReader(bundle.image_transform).tiling
        by_image: dict[Path, list[int]] = {}
        for number, path in enumerate(resolve_images(questions, folder)):
            by_image.setdefault(path, []).append(number)
        alone = not takes_positions(bundle.model.language)  # turns that share an image need positions of their own
        for path, numbers in by_image.items():
            for chosen in [[n] for n in numbers] if alone else [numbers]:
                exchanges = [_exchange(questions[n], path, suffix, first=i == 0) for i, n in enumerate(chosen)]
                self.groups.append((path, chosen, _up_to_answer(encoder.encode(exchanges, True, [tiling(path)]))))

    def margins(
        self, bundle: Bundle, batch_size: int, progress: Callable[[int], object] = lambda _: None
    ) -> list[float]:
        """logit(Yes) - logit(No) of every question, in order.

        Args: batch_size: images in a forward. progress: told how many questions each forward has asked.
        Raises: NumericError N301 if one is not finite.
        """
        bundle.model.eval()
        found: dict[int, float] = {}
        for start in range(0, len(self.groups), batch_size):
            rows = self.groups[start : start + batch_size]
            values = self._forward(bundle, [(path, encoding) for path, _, encoding in rows])
            numbers = [n for _, chosen, _ in rows for n in chosen]
            found |= dict(zip(numbers, values, strict=True))
            progress(len(numbers))
        if not all(map(math.isfinite, found.values())):
            raise NumericError("N301", "the logits of Yes and No are not finite.", "lower the learning rate.")
        return [found[n] for n in range(self.count)]

    @torch.no_grad()
    def _forward(self, bundle: Bundle, rows: Sequence[tuple[Path, Encoding]]) -> list[float]:
        """Margins of the rows' questions; whoever reads attention meanwhile knows what the user says."""
        model = bundle.model
        device = model.language.get_input_embeddings().weight.device
        views = [view for path, _ in rows for view in self.load(path)]
        batch = collate([encoding for _, encoding in rows], views).to(device)
        user = pad_sequence([torch.tensor(e.user) for _, e in rows], batch_first=True).to(device)
        mask, turns = batch.attention_mask, batch.turns
        routing, embeddings = model.embed_batch(batch)
        bias = mask if turns is None else turn_mask(mask, turns, embeddings.dtype)
        with routed(replace(routing, instruction=user)):
            hidden = hidden_states(model.language, embeddings, bias, position_ids(mask, turns))
        logits = logits_of(model.language, hidden.flatten(0, 1)[batch.supervised]).float()  # (questions, vocabulary)
        found: list[float] = (logits[:, self.words[0]] - logits[:, self.words[1]]).tolist()
        return found


def _exchange(question: Question, image: Path, suffix: str, first: bool) -> Exchange:
    text = str(question["text"])
    asked = exchange_of(Request((image,) if first else (), text if text.endswith(suffix) else text + suffix))
    return Exchange(asked.question, WORDS[0])


def _first(encoding: Encoding) -> int:
    """The first answer token."""
    return next(label for label in encoding.labels if label != IGNORE)


def _up_to_answer(encoding: Encoding) -> Encoding:
    """The encoding without what follows each turn's first answer token."""
    out, before = Encoding(tilings=encoding.tilings), IGNORE
    for token, label, turn, user in zip(
        encoding.input_ids, encoding.labels, encoding.turns, encoding.user, strict=True
    ):
        if label == IGNORE or before == IGNORE:
            out.add([token], label != IGNORE, turn, user)
        before = label
    return out
