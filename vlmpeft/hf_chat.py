"""One of our templates as a chat template of transformers, for models that leave the house."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlmpeft.layouts import Exchange
from vlmpeft.template import TurnEncoder

QUESTION, ANSWER = "\uf8f0", "\uf8f1"  # stand for the texts of a turn while a layout is taken apart
JINJA = """\
{%- macro say(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}
{{ '<image>' * (images | length) + ('\\n' if images else '') }}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ (FIRST if loop.first else NEXT) + say(message['content']) }}
{%- elif message['role'] == 'assistant' -%}{{ MIDDLE + say(message['content']) + (END if loop.last else '') }}
{%- else -%}{{ raise_exception('the system prompt is fixed: the one the model was trained with') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ PROMPT }}{%- endif -%}
"""


def chat_template(encoder: TurnEncoder) -> str | None:
    """The encoder's layout in Jinja; None for one that does not show the question, or not every turn alike.

    Images come first, then the text on a line of its own, as `parse_question` lays a question out. The system prompt
    is the one of training.
    """
    first, *rest = _pieces(encoder, [Exchange((QUESTION,), ANSWER)] * 2)
    prompt = _pieces(encoder, [Exchange((QUESTION,))])
    if len(rest) != 4 or rest[0] != rest[2] or len(prompt) != 2 or prompt[0] != first:
        return None
    start = prompt[1].removesuffix(" ") if encoder.space_merges else prompt[1]
    texts = {"FIRST": first, "NEXT": rest[1], "MIDDLE": rest[0], "END": rest[3], "PROMPT": start}
    head = [f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}" for name, text in texts.items()]
    return "\n".join([*head, JINJA])


def _pieces(encoder: TurnEncoder, exchanges: Sequence[Exchange]) -> list[str]:
    """What the template writes before, between and after the texts of a conversation."""
    segments = encoder.template.segments(exchanges, encoder.system)
    text = "".join(segment.lead + segment.text for segment in segments)
    return text.replace(ANSWER, QUESTION).split(QUESTION)
