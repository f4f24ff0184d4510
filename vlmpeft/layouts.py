"""How conversations are laid out: text, images and template pieces in order, before anything is tokenised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, Protocol

from vlmpeft.errors import ModelError, nearest

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
    """

    kind: Kind
    text: str = ""
    lead: str = ""


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
    return [Segment("text", c) if isinstance(c, str) else Segment("image") for c in question]


class Template(Protocol):
    """Lays out a conversation. The last exchange may lack its answer: then the layout ends where generation starts."""

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]: ...


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
    default_system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        out = [Segment("text", self.default_system if system is None else system)]
        before = " USER: "
        for exchange in exchanges:
            out += [Segment("fixed", before), *question_segments(exchange.question), Segment("fixed", " ASSISTANT: ")]
            if exchange.answer is not None:
                out += [Segment("answer", exchange.answer), Segment("end", self.eos)]
            before = "USER: "
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
class _Turn:
    """Template text around one answer. closing: what it adds to the answer itself. end: a special token."""

    lead: str
    closing: str
    end: str


_MARKER: Final = re.compile("\ue000([sqa][0-9]+)\ue001")
_REFUSED: Final = "write the layout by name: template=vicuna_v1 or chatml."


def _marker(name: str) -> str:
    return f"\ue000{name}\ue001"


@dataclass(frozen=True)
class TokenizerTemplate:
    """The tokenizer's own chat template, rendered with a marker in place of every text and then cut at the markers."""

    tokenizer: Any
    _layouts: dict[tuple[int, bool], list[tuple[str, str]]] = field(default_factory=dict, compare=False, repr=False)

    def segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        out: list[Segment] = []
        for fixed, name in self._layout(len(exchanges), system is not None):
            out.append(Segment("fixed", fixed))
            if name == "":
                break
            exchange = exchanges[int(name[1:])]
            if name[0] == "s":
                out.append(Segment("text", system or ""))
            elif name[0] == "q":
                out += question_segments(exchange.question)
            elif exchange.answer is None:
                break
            else:
                turn = self._turn
                out += [Segment("answer", exchange.answer + turn.closing, turn.lead), Segment("end", turn.end)]
        return [s for s in out if s.text or s.kind in ("image", "answer")]

    def _layout(self, turns: int, system: bool) -> list[tuple[str, str]]:
        """Pairs of template text and the name of the text after it; the last name is "". Raises: ModelError M510."""
        if (turns, system) not in self._layouts:
            names = [*(["s0"] if system else []), *(f"{who}{i}" for i in range(turns) for who in "qa")]
            pieces = _MARKER.split(self._render(names))
            shown = pieces[1::2]
            in_order = [n for n in shown if n != "s0"] == [n for n in names if n != "s0"]
            if sorted(shown) != sorted(names) or not in_order:
                raise ModelError(
                    "M510", "the tokenizer's chat template does not show every text once, in order.", _REFUSED
                )
            fixed = pieces[::2]
            for i in (i for i, name in enumerate(shown) if name[0] == "a"):
                fixed[i] = self._without(fixed[i], end=self._turn.lead)
                fixed[i + 1] = self._without(fixed[i + 1], start=self._turn.closing + self._turn.end)
            self._layouts[turns, system] = list(zip(fixed, [*shown, ""], strict=True))
        return self._layouts[turns, system]

    @staticmethod
    def _without(piece: str, start: str = "", end: str = "") -> str:
        """Template text without what belongs to the answer beside it."""
        if not (piece.startswith(start) and piece.endswith(end)):
            raise ModelError("M510", "the tokenizer's chat template does not write every turn alike.", _REFUSED)
        return piece[len(start) : len(piece) - len(end)]

    @cached_property
    def _turn(self) -> _Turn:
        """What the template writes around an answer. Raises: ModelError M510 if no special token ends it."""
        whole, prompt = self._render(["q0", "a0"]), self._render(["q0"], add_generation_prompt=True)
        start = whole.find(_marker("a0"))
        lead = whole[len(prompt) : start] if whole.startswith(prompt) else ""
        rest = whole[start + len(_marker("a0")) :]
        tokens = sorted((t for t in self.tokenizer.get_added_vocab() if t.strip()), key=len, reverse=True)
        found = re.search("|".join(map(re.escape, tokens)), rest) if tokens else None
        if found is None:
            raise ModelError("M510", "the tokenizer's chat template ends an answer with no special token.", _REFUSED)
        return _Turn(lead if lead.isspace() else "", rest[: found.start()], found.group())

    def _render(self, names: Sequence[str], **options: Any) -> str:
        roles = {"s": "system", "q": "user", "a": "assistant"}
        messages = [{"role": roles[name[0]], "content": _marker(name)} for name in names]
        try:
            rendered: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # whatever the template raises: jinja2's errors, TypeError, KeyError, ...
            asked = " with a system prompt" if names[0] == "s0" else ""
            raise ModelError("M510", f"the tokenizer's chat template fails{asked}: {error}.", _REFUSED) from error
        return rendered


TEMPLATES: Final = ("plain", "vicuna_v1", "chatml", "tokenizer")


def template_of(name: str, tokenizer: Any) -> Template:
    """The template called `name`. Raises: ModelError M510 if the tokenizer lacks what the template needs."""
    if name == "plain":
        return Plain()
    if name == "vicuna_v1":
        if not tokenizer.eos_token:
            message = "template vicuna_v1 ends answers with eos, but the tokenizer has no eos token."
            raise ModelError("M510", message, "use template=chatml.")
        return Vicuna(tokenizer.eos_token)
    if name == "chatml":
        for token in ("<|im_start|>", "<|im_end|>"):
            if token not in tokenizer.get_added_vocab():
                message = f"template chatml needs the special token {token}, which the tokenizer lacks."
                raise ModelError("M510", message, "use template=vicuna_v1.")
        return ChatML()
    if name == "tokenizer":
        if not tokenizer.chat_template:
            message = "template=tokenizer, but the tokenizer has no chat template."
            raise ModelError("M510", message, "use template=vicuna_v1 or chatml.")
        return TokenizerTemplate(tokenizer)
    raise ModelError("M509", f"no template '{name}'{nearest(name, TEMPLATES)}")
