"""Questions as the processor of a Hugging Face model lays them out, by its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from vlmpeft.errors import ModelError
from vlmpeft.layouts import Content, ImageSlot

MARKER = "\ue000"  # stands for a text while the template is looked at
USE = "use a model whose processor has a chat template for images."


class ChatPrompts:
    """Renders questions, and encodes them with their images.

    Args:
        processor: of transformers, for images and text.
        name: of the model, for messages.

    Raises: ModelError M519 for a processor without chat template, or whose template does not show an image and a text.
    """

    def __init__(self, processor: Any, name: str) -> None:
        self.processor, self.tokenizer, self.name = processor, processor.tokenizer, name
        self.image_token = str(getattr(processor, "image_token", "<image>"))
        if not (getattr(processor, "chat_template", None) or self.tokenizer.chat_template):
            raise ModelError("M519", f"the processor of '{name}' has no chat template.", USE)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        shown, plain = self.text((ImageSlot(), MARKER)), self.text((MARKER,))
        if MARKER not in plain or len(shown) <= len(plain):
            raise ModelError("M519", f"the chat template of '{name}' does not show an image and a text.", USE)
        self._lead = self._space_before_answers()

    def text(self, question: Content, answer: str | None = None) -> str:
        """The prompt that asks a question, or the whole turn with its answer."""
        messages = [{"role": "user", "content": self._parts(question)}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        try:
            rendered: str = self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None
            )
        except Exception as error:  # whatever a template raises: jinja2's errors, TypeError, KeyError, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError("M519", f"the chat template of '{self.name}' fails: {reason}.", USE) from error
        return rendered

    def _parts(self, question: Content) -> list[dict[str, str]]:
        """A question as a message's content: the template breaks the line after an image itself."""
        parts: list[dict[str, str]] = []
        for piece in question:
            if isinstance(piece, ImageSlot):
                parts.append({"type": "image"})
            else:
                after_image = bool(parts) and parts[-1]["type"] == "image"
                said = piece.removeprefix("\n") if after_image else piece
                parts.append({"type": "text", "text": self._literal(said)})
        return parts

    def _literal(self, text: str) -> str:
        """A text with the image token broken up: processors would take one that a person typed for an image."""
        return text.replace(self.image_token, f"{self.image_token[0]} {self.image_token[1:]}")

    def _space_before_answers(self) -> str:
        """White space the template writes between the prompt and an answer."""
        question: Content = ("?",)
        prompt, whole = self.text(question), self.text(question, MARKER)
        lead = whole[len(prompt) : whole.find(MARKER)] if whole.startswith(prompt) and MARKER in whole else ""
        return lead if lead.isspace() else ""

    def answered(self, prompt: str, answer: str) -> tuple[str, list[int]]:
        """A prompt with an answer, and the tokens of the answer: those after what both texts have in common."""
        whole = prompt + self._lead + answer
        before, ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
        same = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        return whole, ids[same:]

    def inputs(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], side: str) -> Any:
        """Tensors of a padded batch, whose rows all have images or all have none.

        Args: side: that of the padding. Raises: ModelError M519 for what the processor refuses.
        """
        shown = {"images": [list(row) for row in images]} if any(images) else {}
        begin = self.tokenizer.bos_token  # a template that writes it itself must not get another
        special = not (begin and texts[0].startswith(begin))
        try:
            return self.processor(
                text=list(texts), **shown, padding=True, padding_side=side, return_tensors="pt",
                add_special_tokens=special,
            )  # fmt: skip
        except (ValueError, TypeError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError("M519", f"the processor of '{self.name}' refuses a question: {reason}", USE) from error
