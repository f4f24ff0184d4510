"""The tokenizer's own chat template cut at its texts, and SentencePiece's invisible spaces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.errors import ModelError
from vlmpeft.template import IMAGE, Exchange, TurnEncoder

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') }}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
TRIMMING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nI help.<|im_end|>\n{% endif %}" + CHATML
THINKING = CHATML.replace(
    "+ message['content']",
    "+ ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content']",
)
STYLES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "trimming": TRIMMING,
    "default system": DEFAULT_SYSTEM,
    "thinking": THINKING,
}


def tokenizer_with(chat_template: str) -> Any:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = chat_template
    return tokenizer


def messages(turns: list[tuple[str, str | None]], system: str | None = None) -> list[dict[str, str]]:
    rows = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        rows.append({"role": "user", "content": question})
        rows += [] if answer is None else [{"role": "assistant", "content": answer}]
    return rows


def exchanges(turns: list[tuple[str, str | None]]) -> list[Exchange]:
    return [Exchange((question,), answer) for question, answer in turns]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("style", STYLES)
def test_training_ids_are_those_of_the_chat_template(style: str, system: str | None) -> None:
    tokenizer = tokenizer_with(STYLES[style])
    for turns in ([("What is it?", "A cat")], [("What is it?", "A cat"), ("Is it red?", "No"), ("Why?", "Fur")]):
        encoding = TurnEncoder(tokenizer, "tokenizer", 4, system).encode(exchanges(turns))
        expected = tokenizer.apply_chat_template(messages(turns, system))["input_ids"]
        assert encoding.input_ids == expected
        spelled = tokenizer.decode([x for x in encoding.labels if x != IGNORE])
        around = " {} </s>" if style == "llama2" else "{}<|im_end|>"
        assert spelled == "".join(around.format(answer) for _, answer in turns)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("style", ["chatml", "llama2", "trimming", "default system"])
def test_generation_prefix_is_the_templates_generation_prompt(style: str, system: str | None) -> None:
    tokenizer = tokenizer_with(STYLES[style])
    encoder = TurnEncoder(tokenizer, "tokenizer", 4, system)
    for turns in ([("What is it?", None)], [("What is it?", "A cat"), ("Is it red?", None)]):
        expected = tokenizer.apply_chat_template(messages(turns, system), add_generation_prompt=True)["input_ids"]
        assert encoder.encode(exchanges(turns)).input_ids == expected
        answered = encoder.encode(exchanges([*turns[:-1], (turns[-1][0], "No")]))
        assert answered.input_ids[: len(expected)] == expected
        assert answered.labels[len(expected)] != IGNORE


def test_text_that_looks_like_a_marker_or_like_code_is_only_text() -> None:
    tokenizer = tokenizer_with(CHATML)
    for text in ("\ue000a0\ue001", "{{ messages }}", "{% raw %}"):
        encoding = TurnEncoder(tokenizer, "tokenizer", 4).encode([Exchange((text,), text)])
        assert tokenizer.decode([x for x in encoding.labels if x != IGNORE]) == f"{text}<|im_end|>"
        assert f"user\n{text}<|im_end|>" in tokenizer.decode(encoding.input_ids)


@pytest.mark.parametrize(
    ("chat_template", "says"),
    [
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", "ends an answer with no special token"),
        ("{{ '<s>' + messages[-1]['content'] + '</s>' }}", "does not show every text once"),
        ("{% for m in messages %}{{ m['content'] * 2 + '</s>' }}{% endfor %}", "does not show every text once"),
        (CHATML.replace("+ '<|im_end|>\n'", "+ ('<|im_end|>' if loop.last else '</s>')"), "every turn alike"),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{% for", "fails"),
    ],
)  # fmt: skip
def test_chat_template_that_cannot_be_used_is_refused(chat_template: str, says: str) -> None:
    encoder = TurnEncoder(tokenizer_with(chat_template), "tokenizer", 4)
    with pytest.raises(ModelError, match=says) as caught:
        encoder.encode(exchanges([("a", "b"), ("c", "d")]))
    assert caught.value.code == "M510"


def test_template_without_system_role_says_so() -> None:
    refusal = "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    gemma = CHATML.replace("{{'<|im_start|>'", refusal + "{{'<|im_start|>'")
    TurnEncoder(tokenizer_with(gemma), "tokenizer", 4).encode(exchanges([("a", "b")]))
    with pytest.raises(ModelError, match="fails with a system prompt: System role not supported"):
        TurnEncoder(tokenizer_with(gemma), "tokenizer", 4, system="x").encode(exchanges([("a", "b")]))


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tokenizer as Llama's: a space in front of every text, bytes for the unknown, <s> in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = ["A photo of a cat USER: Is it ASSISTANT: Yes", "USER: What is it? a cat? ASSISTANT: No"] * 3
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    core.train_from_iterator([word for row in words for word in row.split()], trainer)
    state = json.loads(core.to_str())
    vocab = state["model"]["vocab"]
    vocab |= {f"<0x{i:02X}>": len(vocab) + i for i in range(256)}
    core = Tokenizer.from_str(json.dumps(state))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_sentencepiece_segments_give_the_tokens_of_the_whole_text(llama: Any) -> None:
    encoder = TurnEncoder(llama, "vicuna_v1", 4, system="A photo")
    whole = llama("A photo USER: What is it? ASSISTANT: Yes</s> USER: Is it a cat? ASSISTANT: No</s>")["input_ids"]
    encoding = encoder.encode([Exchange(("What is it?",), "Yes"), Exchange(("Is it a cat?",), "No")])
    whole.remove(llama.convert_tokens_to_ids("▁"))  # the normaliser's own, between "</s>" and " USER:"
    assert encoding.input_ids == whole
    supervised = llama.convert_ids_to_tokens([x for x in encoding.labels if x != IGNORE])
    assert supervised == ["▁Yes", "</s>", "▁No", "</s>"]
    prefix = encoder.encode([Exchange(("What is it?",))]).input_ids
    assert encoding.input_ids[: len(prefix)] == prefix


def test_sentencepiece_writes_image_and_newline_as_llava_does(llama: Any) -> None:
    """LLaVA tokenises the text on both sides of an image by itself: "USER:" "▁" image "▁" newline (spec 2.2)."""
    ids = (
        TurnEncoder(llama, "vicuna_v1", 1, system="A photo")
        .encode([Exchange((IMAGE, "\nIs it a cat?"), "Yes")])
        .input_ids
    )
    at = ids.index(IMAGE_TOKEN_ID)
    assert llama.convert_ids_to_tokens(ids[at - 2 : at]) == ["▁USER:", "▁"]
    assert llama.convert_ids_to_tokens(ids[at + 1 : at + 3]) == ["▁", "<0x0A>"]
    plain = TurnEncoder(llama, "plain", 1).encode([Exchange((IMAGE,), "A cat")])
    assert llama.convert_ids_to_tokens(plain.labels[2:]) == ["▁A", "▁cat", "<0x0A>"]
