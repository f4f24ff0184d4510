"""Conversations to ids AND labels, segment by segment, so that a mask cannot disagree with the ids.

Nothing is tokenised twice and no boundary is searched in text: each piece of a template, question or answer is encoded by
itself and carries its own label rule. User and assistant text is encoded with special tokens switched off, so `</s>` or
`<image>` typed by a person stays text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.errors import DataError, ModelError, nearest

Kind = Literal["fixed", "text", "image", "answer", "end"]


class ImageSlot:
    """Marks the place of one image in a question."""


IMAGE: Final = ImageSlot()
Content = tuple[str | ImageSlot, ...]


@dataclass(frozen=True)
class Exchange:
    """A question and its answer. Args: answer: None where it is to be generated."""

    question: Content
    answer: str | None = None


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation. "fixed": template text, special tokens parsed; "text": a person's; "answer" and "end" are supervised."""

    kind: Kind
    text: str = ""


def parse_question(text: str) -> Content:
    r"""Split at `<image>` marks; `\<image>` is the literal text.

    A single image goes to the front, followed by a newline, as LLaVA trains it; several stay where they are.
    """
    pieces = [p.replace(r"\<image>", "<image>") for p in re.split(r"(?<!\\)<image>", text)]
    if len(pieces) == 1:
        return (pieces[0],)
    if len(pieces) == 2:
        return (IMAGE, "\n" + "".join(pieces).strip())
    content: list[str | ImageSlot] = [pieces[0]]
    for piece in pieces[1:]:
        content += [IMAGE, piece]
    return tuple(c for c in content if c != "")


def question_segments(question: Content) -> list[Segment]:
    """Segments of a question's text and images."""
    return [Segment("text", c) if isinstance(c, str) else Segment("image") for c in question]


class Template(Protocol):
    """Lays out a conversation. The last exchange may lack its answer: then the layout ends where generation starts."""

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]: ...


@dataclass(frozen=True)
class Plain:
    """Stage-1 captions: images, caption, newline; the question is not used (LLaVA `plain`)."""

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        first = exchanges[0]
        images = [s for s in question_segments(first.question) if s.kind == "image"]
        return images if first.answer is None else [*images, Segment("answer", first.answer), Segment("end", "\n")]


@dataclass(frozen=True)
class Vicuna:
    """`{system} USER: {q} ASSISTANT: {a}</s>USER: ...` (LLaVA `v1`); the end is the tokenizer's eos."""

    eos: str
    default_system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        head = (self.default_system if system is None else system) + " "
        out: list[Segment] = []
        for exchange in exchanges:
            out += [Segment("fixed", head + "USER: "), *question_segments(exchange.question), Segment("fixed", " ASSISTANT: ")]
            if exchange.answer is not None:
                out += [Segment("answer", exchange.answer), Segment("end", self.eos)]
            head = ""
        return out


@dataclass(frozen=True)
class ChatML:
    """`<|im_start|>role\\n...<|im_end|>\\n`; no system turn unless one is given."""

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        out: list[Segment] = []
        if system is not None:
            out += [Segment("fixed", "<|im_start|>system\n"), Segment("text", system), Segment("fixed", "<|im_end|>\n")]
        for exchange in exchanges:
            out += [Segment("fixed", "<|im_start|>user\n"), *question_segments(exchange.question)]
            out.append(Segment("fixed", "<|im_end|>\n<|im_start|>assistant\n"))
            if exchange.answer is not None:
                out += [Segment("answer", exchange.answer), Segment("end", "<|im_end|>"), Segment("fixed", "\n")]
        return out


@dataclass(frozen=True)
class TokenizerTemplate:
    """The tokenizer's own chat template, rendered once with markers in place of every text and then cut at the markers."""

    tokenizer: Any

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        messages = [] if system is None else [{"role": "system", "content": _marker("s", 0)}]
        for i in range(len(exchanges)):
            messages += [{"role": "user", "content": _marker("q", i)}, {"role": "assistant", "content": _marker("a", i)}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False)
        out: list[Segment] = []
        for i, piece in enumerate(re.split(_MARKER, rendered)):
            if i % 2 == 0:  # template text between two markers
                after_answer = bool(out) and out[-1].kind == "answer"
                out += self._closing(piece) if after_answer else [Segment("fixed", piece)]
                continue
            who, index = piece[0], int(piece[1:])
            if who == "s":
                out.append(Segment("text", system or ""))
            elif who == "q":
                out += question_segments(exchanges[index].question)
            elif (answer := exchanges[index].answer) is None:
                return [s for s in out if s.kind == "image" or s.text]
            else:
                out.append(Segment("answer", answer))
        return [s for s in out if s.kind == "image" or s.text]

    def _closing(self, piece: str) -> list[Segment]:
        """Template text after an answer: up to its first special token it ends the answer and is supervised."""
        for token in sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True):
            start = piece.find(token)
            if start >= 0 and not any(t in piece[:start] for t in self.tokenizer.get_added_vocab()):
                cut = start + len(token)
                return [Segment("end", piece[:cut]), Segment("fixed", piece[cut:])]
        raise ModelError("M510", "the tokenizer's chat template does not end an answer with a special token.", "set template=vicuna_v1 or chatml.")


_MARKER: Final = "\ue000([sqa]\\d+)\ue001"


def _marker(who: str, index: int) -> str:
    return f"\ue000{who}{index}\ue001"


TEMPLATES = ("plain", "vicuna_v1", "chatml", "tokenizer")


def template_of(name: str, tokenizer: Any) -> Template:
    """The template called `name`. Raises: ModelError M510 if the tokenizer lacks what the template needs."""
    if name == "plain":
        return Plain()
    if name == "vicuna_v1":
        if not tokenizer.eos_token:
            raise ModelError("M510", "template vicuna_v1 ends answers with eos, but the tokenizer has no eos token.", "use template=chatml.")
        return Vicuna(tokenizer.eos_token)
    if name == "chatml":
        for token in ("<|im_start|>", "<|im_end|>"):
            if token not in tokenizer.get_vocab():
                raise ModelError("M510", f"template chatml needs the token {token}, which the tokenizer lacks.", "use template=vicuna_v1.")
        return ChatML()
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise ModelError("M510", "template=tokenizer, but the tokenizer has no chat template.", "use template=vicuna_v1 or chatml.")
        return TokenizerTemplate(tokenizer)
    raise ModelError("M509", f"no template '{name}'{nearest(name, TEMPLATES)}")


@dataclass(frozen=True)
class Encoding:
    """A conversation as ids. Three lists of one length.

    Args:
        input_ids: IMAGE_TOKEN_ID at image tokens.
        labels: IGNORE where no loss.
        turns: see `Batch.turns`.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], supervised: bool, turn: int) -> None:
        """Append ids with the same rule."""
        self.input_ids.extend(ids)
        self.labels.extend(ids if supervised else [IGNORE] * len(ids))
        self.turns.extend([turn] * len(ids))

    @property
    def num_supervised(self) -> int:
        """How many tokens carry a label."""
        return sum(label != IGNORE for label in self.labels)


class TurnEncoder:
    """Encodes conversations for one tokenizer and template.

    Args:
        tokenizer: any Hugging Face tokenizer.
        template: a name of `TEMPLATES`.
        image_tokens: tokens one image takes after the projector.
        system: system prompt; None keeps the template's own.
    """

    def __init__(self, tokenizer: Any, template: str, image_tokens: int, system: str | None = None) -> None:
        self.tokenizer, self.image_tokens, self.system = tokenizer, image_tokens, system
        self.template = template_of(template, tokenizer)
        begin = tokenizer("a")["input_ids"][:1]
        own_begin = isinstance(self.template, TokenizerTemplate)  # a chat template writes its own beginning of sequence
        self.begin = begin if tokenizer.bos_token_id is not None and begin == [tokenizer.bos_token_id] and not own_begin else []
        self.space_merges = tokenizer.convert_ids_to_tokens(self._ids("a", special=False))[0].startswith("\u2581")
        self._fixed: dict[str, list[int]] = {}

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
        return ids

    def segment_ids(self, segment: Segment) -> list[int]:
        """Ids of one segment. Raises: DataError D111 for text that is not valid Unicode."""
        if segment.kind == "image":
            return [IMAGE_TOKEN_ID] * self.image_tokens
        if segment.kind in ("fixed", "end"):
            # SentencePiece puts the space before a word itself: "ASSISTANT:" + "Yes" is "ASSISTANT: Yes".
            text = segment.text.removesuffix(" ") if self.space_merges and segment.kind == "fixed" else segment.text
            if text not in self._fixed:
                self._fixed[text] = self._ids(text, special=True)
            return self._fixed[text]
        try:
            segment.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("D111", f"text holds a lone surrogate at character {error.start}.", "repair the text's encoding.") from error
        return self._ids(segment.text, special=False)

    def encode(self, exchanges: Sequence[Exchange], independent: bool = False) -> Encoding:
        """Ids, labels and turns of a conversation.

        Args:
            exchanges: at least one; without an answer in the last, the result ends where generation starts.
            independent: answer each question by itself after the images (see `Batch.turns`). Conversations without
                images, or with images after the first question, keep their order.
        """
        if independent and len(exchanges) > 1 and _images_lead(exchanges):
            return self._encode_independent(exchanges)
        out = Encoding()
        out.add(self.begin, supervised=False, turn=0)
        for segment in self.template.segments(exchanges, self.system):
            out.add(self.segment_ids(segment), segment.kind in ("answer", "end"), turn=0)
        return out

    def _encode_independent(self, exchanges: Sequence[Exchange]) -> Encoding:
        first = exchanges[0].question
        images = first[: max(i for i, c in enumerate(first) if isinstance(c, ImageSlot)) + 1]
        out = Encoding()
        out.add(self.begin, supervised=False, turn=0)
        for turn, exchange in enumerate(exchanges, start=1):
            question = first if turn == 1 else (*images, *_after_image(exchange.question))
            segments = self.template.segments([Exchange(question, exchange.answer)], self.system)
            shared = max(i for i, s in enumerate(segments) if s.kind == "image") + 1
            for segment in segments[:shared] if turn == 1 else []:
                out.add(self.segment_ids(segment), supervised=False, turn=0)
            for segment in segments[shared:]:
                out.add(self.segment_ids(segment), segment.kind in ("answer", "end"), turn=turn)
        return out


def _images_lead(exchanges: Sequence[Exchange]) -> bool:
    has = [any(isinstance(c, ImageSlot) for c in e.question) for e in exchanges]
    return has[0] and not any(has[1:]) and all(isinstance(e.question[0], str) for e in exchanges[1:])


def _after_image(question: Content) -> Content:
    """A later question as it reads right after an image: on a line of its own."""
    return ("\n" + question[0], *question[1:]) if question and isinstance(question[0], str) else question
