"""Conversations to ids AND labels, segment by segment, so that a mask cannot disagree with the ids.

Nothing is tokenised twice and no boundary is searched in text: each piece of a template, question or answer is encoded
by itself and carries its own label rule. User and assistant text is encoded with special tokens switched off, so `</s>`
or `<image>` typed by a person stays text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from vlmpeft.anyres import Grid, Tiling, merged_tokens
from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.errors import DataError
from vlmpeft.layout_names import TEMPLATES, template_of
from vlmpeft.layout_tokenizer import TokenizerTemplate
from vlmpeft.layouts import IMAGE, Content, Exchange, ImageSlot, Plain, Segment, Template, parse_question

__all__ = ["IMAGE", "TEMPLATES", "Content", "Encoding", "Exchange", "ImageSlot", "Segment", "Template", "TurnEncoder"]
__all__ += ["parse_question", "template_of"]

WORD_START: Final = "\u2581"  # SentencePiece's mark of a word's beginning
REMEMBERED = 50_000  # texts whose ids are kept: a data set asks the same questions again and again


@dataclass(frozen=True)
class Encoding:
    """A conversation as ids. Lists of one length.

    Args:
        input_ids: IMAGE_TOKEN_ID at image tokens.
        labels: IGNORE where no loss.
        turns: see `Batch.turns`.
        user: what a user says (see `Segment.user`); empty where nobody knows.
        tilings: of the images, see `Batch.tilings`; this one list is as long as there are images, or empty.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    user: list[bool] = field(default_factory=list, compare=False)
    tilings: list[Tiling] = field(default_factory=list)

    def add(self, ids: Sequence[int], supervised: bool, turn: int, user: bool = False) -> None:
        """Append ids with the same rule."""
        self.user.extend([user] * len(ids))
        self.input_ids.extend(ids)
        self.labels.extend(ids if supervised else [IGNORE] * len(ids))
        self.turns.extend([turn] * len(ids))

    @property
    def num_supervised(self) -> int:
        """How many tokens carry a label."""
        return len(self.labels) - self.labels.count(IGNORE)


class TurnEncoder:
    """Encodes conversations for one tokenizer and template.

    Args:
        tokenizer: any Hugging Face tokenizer.
        template: a name of `TEMPLATES`.
        image_tokens: tokens one view of an image takes after the projector.
        system: system prompt; None keeps the template's own.
        new_tokens: tokens of the user's own, which stand for themselves wherever a text holds them.
        view_grid: rows and columns of these image tokens, where tiles merge by spatial_unpad; None where they do not.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        image_tokens: int,
        system: str | None = None,
        new_tokens: Collection[str] = (),
        view_grid: Grid | None = None,
    ) -> None:
        self.tokenizer, self.image_tokens, self.system = tokenizer, image_tokens, system
        self.view_grid = view_grid
        self.template = template_of(template, tokenizer)
        begin = tokenizer("a")["input_ids"][:1]
        own_begin = isinstance(self.template, TokenizerTemplate)  # a chat template writes its own beginning of sequence
        has_begin = tokenizer.bos_token_id is not None and begin == [tokenizer.bos_token_id]
        self.begin: list[int] = begin if has_begin and not own_begin else []
        self._reserved = {i: t for i, t in _reserved(tokenizer).items() if t not in new_tokens}
        self._ids: dict[tuple[str, bool], list[int]] = {}
        self._backend = self._fast_backend()
        # SentencePiece puts the space before a word itself: "ASSISTANT:" + "Yes" is "ASSISTANT: Yes".
        word = self._plain_ids("a", special=False)
        self.space_merges = tokenizer.convert_ids_to_tokens(word)[0].startswith(WORD_START)
        # Some tokenizers do it only where no space stands: written out, it is there for a text with a space of its own.
        only_where_missing = self.space_merges and word == self._plain_ids(" a", special=False)
        self._word_space = " " if only_where_missing else ""

    def _tokenize(self, text: str, special: bool) -> list[int]:
        key = (text, special)
        if key not in self._ids:
            if len(self._ids) >= REMEMBERED:
                self._ids.clear()
            if special or not text:
                self._ids[key] = self._plain_ids(text, special)
            else:
                self._ids[key] = self._as_text(text, self._plain_ids(self._word_space + text, special))
        return self._ids[key]

    def _plain_ids(self, text: str, special: bool) -> list[int]:
        return self._call(text, special) if self._backend is None else _rust_ids(self._backend, text, special)

    def _call(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
        return ids

    def _fast_backend(self) -> Any:
        """The tokenizer's Rust core, a third of the time a call; None where the tokenizer does more than call it."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
        probe = f"A a\n {self.tokenizer.eos_token} 1"
        agrees = backend and all(_rust_ids(backend, probe, s) == self._call(probe, s) for s in (True, False))
        return backend if agrees else None

    def _as_text(self, text: str, ids: list[int]) -> list[int]:
        """The ids of a person's text. Added tokens not marked special are matched nevertheless: they are broken up."""
        if self._reserved.keys().isdisjoint(ids):
            return ids
        found = {t for i in ids if (t := self._reserved.get(i)) is not None and t in text}
        if not found:
            return ids
        inside = "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in found)
        return [i for piece in re.split(inside, text) for i in self._tokenize(piece, special=False)]

    def tokens_of(self, tiling: Tiling) -> int:
        """Tokens of an image that is shown so."""
        if self.view_grid is None:
            return tiling.views * self.image_tokens
        return merged_tokens(tiling, self.view_grid)

    def segment_ids(self, segment: Segment) -> list[int]:
        """Ids of one segment of text. Raises: DataError D111 for text that is not valid Unicode."""
        if segment.kind in ("fixed", "end"):
            return self._fixed_ids(segment.text)
        lead = segment.lead.removeprefix(" ") if self.space_merges else segment.lead
        try:
            segment.text.encode("utf-8")
        except UnicodeEncodeError as error:
            place = f"text holds a lone surrogate at character {error.start}."
            raise DataError("D111", place, "repair the text's encoding.") from error
        return self._tokenize(lead + segment.text, special=False)

    def _fixed_ids(self, text: str) -> list[int]:
        """Ids of template text, without the word start that SentencePiece would invent before a space or a newline."""
        if not self.space_merges or not text[:1].isspace():
            return self._tokenize(text, special=True)
        ids = self._tokenize(text.removeprefix(" "), special=True)
        invented = text[0] != " " and self.tokenizer.convert_ids_to_tokens(ids[:1]) == [WORD_START]
        return ids[1:] if invented else ids

    def _segments(self, exchanges: Sequence[Exchange]) -> list[Segment]:
        """The template's segments, a last space of template text joined to the word after it as the tokenizer does."""
        out: list[Segment] = []
        for segment in self.template.segments(exchanges, self.system):
            spaced = bool(out) and out[-1].kind == "fixed" and out[-1].text.endswith(" ")
            if spaced and segment.kind != "image" and (self.space_merges or segment.kind == "text"):
                out[-1] = Segment("fixed", out[-1].text[:-1])
                segment = segment if self.space_merges else replace(segment, text=" " + segment.text)
            out.append(segment)
        if self.space_merges and out[-1].kind == "fixed":  # where generation starts: as before an answer
            out[-1] = Segment("fixed", out[-1].text.removesuffix(" "))
        return out

    def encode(
        self, exchanges: Sequence[Exchange], independent: bool = False, tilings: Sequence[Tiling] = ()
    ) -> Encoding:
        """Ids, labels and turns of a conversation.

        Args:
            exchanges: at least one; without an answer in the last, the result ends where generation starts.
            independent: answer each question by itself after the images (see `Batch.turns`). Conversations without
                images, or with images after the first question, keep their order, and so does a template without
                questions, where nothing but the turn before could predict an answer's first token.
            tilings: of the images, in order of appearance (see `ImageTransform`); one view for those not named.
        """
        shown = itertools.chain(tilings, itertools.repeat(Tiling()))
        if independent and len(exchanges) > 1 and _images_lead(exchanges) and not isinstance(self.template, Plain):
            return self._encode_independent(exchanges, shown)
        out = Encoding()
        out.add(self.begin, supervised=False, turn=0)
        self._append(out, self._segments(exchanges), 0, shown)
        return out

    def _append(self, out: Encoding, segments: Sequence[Segment], turn: int, shown: Iterator[Tiling]) -> None:
        """Add segments to an encoding; an image takes as many tokens as `tokens_of` says."""
        for segment in segments:
            if segment.kind == "image":
                tiling = next(shown)
                out.add([IMAGE_TOKEN_ID] * self.tokens_of(tiling), supervised=False, turn=turn, user=segment.user)
                out.tilings.extend([] if self.view_grid is None else [tiling])
            else:
                out.add(self.segment_ids(segment), segment.kind in ("answer", "end"), turn, segment.user)

    def _encode_independent(self, exchanges: Sequence[Exchange], shown: Iterator[Tiling]) -> Encoding:
        first = exchanges[0].question
        images = first[: max(i for i, c in enumerate(first) if isinstance(c, ImageSlot)) + 1]
        out = Encoding()
        out.add(self.begin, supervised=False, turn=0)
        for turn, exchange in enumerate(exchanges, start=1):
            question = first if turn == 1 else (*images, *_after_image(exchange.question))
            segments = self._segments([Exchange(question, exchange.answer)])
            shared = max(i for i, s in enumerate(segments) if s.kind == "image") + 1
            self._append(out, segments[:shared] if turn == 1 else [], 0, shown)
            self._append(out, segments[shared:], turn, shown)
        return out


def _rust_ids(backend: Any, text: str, special: bool) -> list[int]:
    backend.encode_special_tokens = not special
    backend.no_padding()
    backend.no_truncation()
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _reserved(tokenizer: Any) -> dict[int, str]:
    """Added tokens that must not come from a person's text: all but words and white space someone added."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    signs = {t: i for t, i in added.items() if len(t.strip()) > 1 and not (t[0].isalnum() or t[-1].isalnum())}
    return {i: t for t, i in signs.items() if i != tokenizer.unk_token_id}


def _images_lead(exchanges: Sequence[Exchange]) -> bool:
    """Whether all images are in the first question."""
    has = [any(isinstance(c, ImageSlot) for c in e.question) for e in exchanges]
    return has[0] and not any(has[1:])


def _after_image(question: Content) -> Content:
    """A later question as it reads right after an image: on a line of its own."""
    return ("\n" + question[0], *question[1:]) if question and isinstance(question[0], str) else question
