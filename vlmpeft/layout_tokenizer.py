"""The layout a tokenizer brings along: its chat template, cut into segments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from vlmpeft.errors import ModelError
from vlmpeft.layouts import Exchange, Segment, question_segments


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
