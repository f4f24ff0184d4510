"""Records as LMAR reads them: with the turns known, and answered by the data or by the model itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmpeft.batch import IGNORE, collate
from vlmpeft.build import Bundle
from vlmpeft.decode import generate_each, stop_tokens
from vlmpeft.errors import DataError
from vlmpeft.images import ImageReader
from vlmpeft.language import hidden_states
from vlmpeft.readers import read_records
from vlmpeft.records import Conversation, RecordParser
from vlmpeft.routed import routed
from vlmpeft.routing import position_ids, turn_mask
from vlmpeft.template import Encoding, Exchange, TurnEncoder


@dataclass(frozen=True)
class Shown:
    """A conversation as a model reads it: `encoding.labels` say which tokens answer."""

    conversation: Conversation
    encoding: Encoding

    @property
    def images(self) -> tuple[Path, ...]:
        """Files in order of appearance."""
        return self.conversation.images


def with_images(path: str, images: str, n: int) -> list[Conversation]:
    """The first n records that show an image. Raises: DataError as `RecordParser`; D112 if there is none."""
    parse = RecordParser(Path(path), Path(images))
    parsed = (parse(index, record) for index, record in enumerate(read_records(Path(path))))
    found = list(itertools.islice((c for c in parsed if c.images), n))
    if not found:
        raise DataError("D112", f"{path}: no record shows an image.", "give records with an image.")
    return found


def answered_by_data(bundle: Bundle, conversations: Sequence[Conversation]) -> list[Shown]:
    """Conversations with the data's own answers, turns as the model's stage has them; too long ones are left out."""
    independent = bundle.stage.turns == "independent"
    found = [Shown(c, _encode(bundle, c, c.exchanges, independent)) for c in conversations]
    return [shown for shown in found if len(shown.encoding.input_ids) <= bundle.recipe.data.max_length]


def answered_by_model(
    bundle: Bundle, conversations: Sequence[Conversation], max_new_tokens: int, batch_size: int
) -> list[Shown]:
    """First questions with the model's own greedy answers, token by token as it wrote them."""
    stops = stop_tokens(bundle.turn_encoder())
    read, found = ImageReader(bundle.image_transform), []
    bundle.model.eval()
    for chosen in batched(conversations, batch_size):
        prompts = [_encode(bundle, c, [Exchange(c.exchanges[0].question)], False) for c in chosen]
        views = [view for c in chosen for path in c.images for view in read(path)]
        with torch.no_grad():
            tokens, _ = generate_each(bundle.model, prompts, views, max_new_tokens, stops)
        for conversation, prompt, row in zip(chosen, prompts, tokens.tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            prompt.add(row[:end], supervised=True, turn=0)
            found.append(Shown(conversation, prompt))
    return found


def _encode(
    bundle: Bundle, conversation: Conversation, exchanges: Sequence[Exchange], independent: bool
) -> Encoding:  # fmt: skip
    encoder: TurnEncoder = bundle.turn_encoder()
    if conversation.system is not None:
        encoder = copy.copy(encoder)
        encoder.system = conversation.system
    tiling = ImageReader(bundle.image_transform).tiling
    return encoder.encode(exchanges, independent, [tiling(path) for path in conversation.images])


def batched(items: Sequence[Conversation] | Sequence[Shown], size: int) -> Iterator[list]:
    """Items in groups of at most `size`."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


@torch.no_grad()
def run(bundle: Bundle, shown: Sequence[Shown]) -> None:
    """One forward of some samples, below the head, for whoever watches it: the routing knows what users say."""
    model, read = bundle.model.eval(), ImageReader(bundle.image_transform)
    views = [view for s in shown for path in s.images for view in read(path)]
    device = model.language.get_input_embeddings().weight.device
    batch = collate([s.encoding for s in shown], views).to(device)
    user = pad_sequence([torch.tensor(s.encoding.user) for s in shown], batch_first=True).to(device)
    mask, turns = batch.attention_mask, batch.turns
    routing, embeddings = model.embed_batch(batch)
    bias: Tensor = mask if turns is None else turn_mask(mask, turns, embeddings.dtype)
    with routed(replace(routing, instruction=user)):
        hidden_states(model.language, embeddings, bias, position_ids(mask, turns))


def answers(shown: Shown) -> list[list[int]]:
    """Positions of the tokens of each answer."""
    labels = shown.encoding.labels
    runs = itertools.groupby(range(len(labels)), key=lambda i: labels[i] != IGNORE)
    return [list(places) for supervised, places in runs if supervised]
