"""How conversations are laid out: text, images and template pieces in order, before anything is tokenised."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

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
    """A piece of a conversation.

    Args:
        kind: "fixed" is template text, special tokens parsed; "text" a person's; "answer" and "end" are supervised.
        lead: white space the template puts before an answer but not at the end of its generation prompt.
        user: whether it holds what a user says, alone or (in layouts tokenised whole) with template text around it.
    """

    kind: Kind
    text: str = ""
    lead: str = ""
    user: bool = field(default=False, compare=False)


def parse_question(text: str) -> Content:
    r"""Split at `<image>` marks; `\<image>` is the literal text.

    A single image goes to the front, followed by a newline, as LLaVA trains it; several stay where they are.
    """
    pieces = [p.replace(r"\<image>", "<image>") for p in re.split(r"(?<!\\)<image>", text)]
    if len(pieces) == 1:
        return (pieces[0],)
    if len(pieces) == 2:
        rest = "".join(pieces).strip()
        return (IMAGE, "\n" + rest) if rest else (IMAGE,)
    content: list[str | ImageSlot] = [pieces[0]]
    for piece in pieces[1:]:
        content += [IMAGE, piece]
    return tuple(c for c in content if c != "")


def question_segments(question: Content) -> list[Segment]:
    """Segments of a question's text and images."""
    return [Segment("text", c, user=True) if isinstance(c, str) else Segment("image") for c in question]


class Template(Protocol):
    """Lays out a conversation. The last exchange may lack its answer: then the layout ends where generation starts."""

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]: ...


VICUNA_SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM: Final = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
"""System prompts of LLaVA's `vicuna_v1` and `llava_llama_2` (llava/conversation.py)."""


@dataclass(frozen=True)
class Plain:
    """Stage-1 captions: images, caption, newline; the question is not used (LLaVA `plain`)."""

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        out: list[Segment] = []
        for exchange in exchanges:
            out += [s for s in question_segments(exchange.question) if s.kind == "image"]
            if exchange.answer is not None:
                out += [Segment("answer", exchange.answer), Segment("end", "\n")]
        return out


@dataclass(frozen=True)
class Vicuna:
    """`{system} USER: {q} ASSISTANT: {a}</s>USER: ...` (LLaVA `v1`); the end is the tokenizer's eos."""

    eos: str

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        out = [Segment("text", VICUNA_SYSTEM if system is None else system)]
        before = " USER: "
        for exchange in exchanges:
            out += [Segment("fixed", before), *question_segments(exchange.question), Segment("fixed", " ASSISTANT: ")]
            if exchange.answer is not None:
                out += [Segment("answer", exchange.answer), Segment("end", self.eos)]
            before = "USER: "
        return out


@dataclass(frozen=True)
class WholeVicuna:
    """The text of `Vicuna` with ids and labels exactly as LLaVA and TinyLLaVA have them.

    They tokenise it whole between images and ends, not piece by piece, and the space before an answer is part of its
    first token: the prompt ends with `ASSISTANT:`.
    """

    eos: str

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        out: list[Segment] = []
        before = f"{VICUNA_SYSTEM if system is None else system} USER: "
        for exchange in exchanges:
            out += _whole(before, exchange.question, " ASSISTANT:")
            if exchange.answer is not None:
                out += [Segment("answer", exchange.answer, lead=" "), Segment("end", self.eos)]
            before = "USER: "
        return out


@dataclass(frozen=True)
class Instruct:
    """`[INST] <<SYS>>...<</SYS>> {q} [/INST] {a} </s>`, ids and labels as LLaVA's `llava_llama_2`, `mistral_instruct`.

    Args:
        begin: token in front of every turn but the first.
        default_system: "" for no system block.
    """

    eos: str
    begin: str = ""
    default_system: str = ""

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        out: list[Segment] = []
        prompt = self.default_system if system is None else system
        before = f"[INST] <<SYS>>\n{prompt}\n<</SYS>>\n\n" if prompt else "[INST] "
        for exchange in exchanges:
            if out and self.begin:
                out.append(Segment("fixed", self.begin))
            out += _whole(before, exchange.question, " [/INST]")
            if exchange.answer is not None:
                out += [Segment("answer", exchange.answer + " ", lead=" "), Segment("end", self.eos)]
            before = "[INST] "
        return out


def _whole(before: str, question: Content, after: str) -> Iterator[Segment]:
    """Segments of a question and the template text around it, with every run of texts joined into one."""
    pieces: list[tuple[str | ImageSlot, bool]] = [(before, False), *((c, True) for c in question), (after, False)]
    for is_text, run in itertools.groupby(pieces, key=lambda piece: isinstance(piece[0], str)):
        if is_text:
            texts = list(run)
            yield Segment("text", "".join(c for c, _ in texts if isinstance(c, str)), user=any(u for _, u in texts))
        else:
            yield from (Segment("image") for _ in run)


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
