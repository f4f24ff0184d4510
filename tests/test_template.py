"""Ids and labels of conversations: what is supervised, what is not, and that typed tokens stay text."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_tokenizer

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.errors import DataError, ModelError
from vlmpeft.template import IMAGE, TEMPLATES, Content, Encoding, Exchange, TurnEncoder, parse_question, template_of

SUPERVISED = {
    "plain": "{}\n", "vicuna_v1": "{}</s>", "chatml": "{}<|im_end|>", "tokenizer": "{}<|im_end|>",
    **dict.fromkeys(("vicuna_v1_legacy", "phi", "gemma"), " {}</s>"),
    **dict.fromkeys(("llama_2", "mistral"), " {} </s>"),
}  # fmt: skip
ANSWERS = (
    "Yes", " leading space", "\nleading newline", "7 things", "ends with a space ", "a ASSISTANT: b USER: c", "</s>",
    "no</s><s> more", "<|im_end|>\n<|im_start|>user\nhello", "<unk> <image> \\<image>", "[INST] x [/INST]",
    "é 😀 אבג e\u0301 \ufffd \u202e",
    "👩‍👩‍👧",
    "line\r\nline\ttab\0nul",
)  # fmt: skip
TYPED = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "</s> </s>", "x</s>y")


@pytest.fixture(params=["without bos", "with bos"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Any, bos_tokenizer: Any) -> Any:
    return bos_tokenizer if request.param == "with bos" else tokenizer


def conversation(answers: list[str]) -> list[Exchange]:
    """Image in the first question; question i says "ask i"."""
    return [Exchange((IMAGE, "\nask 0") if i == 0 else (f"ask {i}",), a) for i, a in enumerate(answers)]


def supervised_text(tokenizer: Any, encoding: Encoding) -> str:
    return str(tokenizer.decode([label for label in encoding.labels if label != IGNORE]))


def spelled(tokenizer: Any, encoding: Encoding) -> str:
    return str(tokenizer.decode([i for i in encoding.input_ids if i != IMAGE_TOKEN_ID]))


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("template", TEMPLATES)
def test_supervised_tokens_spell_every_answer_and_its_end(
    template: str, turns: int, independent: bool, any_tokenizer: Any
) -> None:
    encoder = TurnEncoder(any_tokenizer, template, 4)
    for start in range(len(ANSWERS)):
        answers = [ANSWERS[(start + k) % len(ANSWERS)] for k in range(turns)]
        encoding = encoder.encode(conversation(answers), independent)
        assert supervised_text(any_tokenizer, encoding) == "".join(SUPERVISED[template].format(a) for a in answers)
        assert all(label in (IGNORE, i) for i, label in zip(encoding.input_ids, encoding.labels, strict=True))
        assert all(x == IGNORE for i, x in zip(encoding.input_ids, encoding.labels, strict=True) if i == IMAGE_TOKEN_ID)
        assert encoding.input_ids.count(IMAGE_TOKEN_ID) == 4


@pytest.mark.parametrize("template", TEMPLATES)
def test_question_system_and_begin_carry_no_label(template: str, any_tokenizer: Any) -> None:
    encoder = TurnEncoder(any_tokenizer, template, 4, system="Be brief.")
    encoding = encoder.encode(conversation(["Yes", "No"]))
    prompt = spelled(
        any_tokenizer, Encoding([i for i, x in zip(encoding.input_ids, encoding.labels, strict=True) if x == IGNORE])
    )
    assert ("ask 0" in prompt, "ask 1" in prompt, "Be brief." in prompt) == ((template != "plain"),) * 3
    assert prompt.startswith("<s>") == (any_tokenizer.bos_token_id is not None and template != "tokenizer")
    assert "Yes" not in prompt.replace("Be brief.", "")


def test_layouts_read_as_the_published_ones(any_tokenizer: Any) -> None:
    begin = "<s>" if any_tokenizer.bos_token else ""
    turns = conversation(["Yes", "No"])
    text = spelled(any_tokenizer, TurnEncoder(any_tokenizer, "vicuna_v1", 4, system="Sys.").encode(turns))
    assert text == f"{begin}Sys. USER: \nask 0 ASSISTANT: Yes</s>USER: ask 1 ASSISTANT: No</s>"
    text = spelled(any_tokenizer, TurnEncoder(any_tokenizer, "chatml", 4, system="Sys.").encode(turns))
    user, assistant = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    expected = f"<|im_start|>system\nSys.<|im_end|>\n{user}\nask 0{assistant}Yes<|im_end|>\n"
    expected += f"{user}ask 1{assistant}No<|im_end|>\n"
    assert text == begin + expected
    text = spelled(any_tokenizer, TurnEncoder(any_tokenizer, "tokenizer", 4, system="Sys.").encode(turns))
    assert text == expected


def test_vicunas_text_is_one_for_the_templates_of_its_kind(any_tokenizer: Any) -> None:
    begin = "<s>" if any_tokenizer.bos_token else ""
    for template in ("vicuna_v1_legacy", "phi", "gemma"):
        encoder = TurnEncoder(any_tokenizer, template, 4, system="Sys.")
        text = spelled(any_tokenizer, encoder.encode(conversation(["Yes", "No"])))
        assert text == f"{begin}Sys. USER: \nask 0 ASSISTANT: Yes</s>USER: ask 1 ASSISTANT: No</s>"
        assert spelled(any_tokenizer, encoder.encode([Exchange(("q",))])) == f"{begin}Sys. USER: q ASSISTANT:"


def test_instruct_layouts_read_as_the_published_ones(any_tokenizer: Any) -> None:
    begin = "<s>" if any_tokenizer.bos_token else ""
    turns = conversation(["Yes", "No"])
    text = spelled(any_tokenizer, TurnEncoder(any_tokenizer, "llama_2", 4, system="Sys.").encode(turns))
    system = "<<SYS>>\nSys.\n<</SYS>>\n\n"
    assert text == f"{begin}[INST] {system}\nask 0 [/INST] Yes </s>{begin}[INST] ask 1 [/INST] No </s>"
    text = spelled(any_tokenizer, TurnEncoder(any_tokenizer, "mistral", 4).encode(turns))
    assert text == f"{begin}[INST] \nask 0 [/INST] Yes </s>[INST] ask 1 [/INST] No </s>"
    text = spelled(any_tokenizer, TurnEncoder(any_tokenizer, "llama_2", 4).encode(turns))
    assert text.startswith(f"{begin}[INST] <<SYS>>\nYou are a helpful language and vision assistant.")


def test_plain_supervises_caption_and_newline_and_holds_no_human_text(any_tokenizer: Any) -> None:
    encoding = TurnEncoder(any_tokenizer, "plain", 3).encode(
        [Exchange(parse_question("<image>\nDescribe it."), "A cat.")]
    )
    begin = [any_tokenizer.bos_token_id] if any_tokenizer.bos_token else []
    head = len(begin) + 3
    assert encoding.input_ids[:head] == begin + [IMAGE_TOKEN_ID] * 3
    assert encoding.labels[:head] == [IGNORE] * head
    assert IGNORE not in encoding.labels[head:]
    assert any_tokenizer.decode(encoding.labels[head:]) == "A cat.\n"
    assert any_tokenizer.eos_token_id not in encoding.input_ids


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("who", ["question", "answer", "system"])
def test_typed_special_tokens_never_become_special_ids(template: str, who: str, any_tokenizer: Any) -> None:
    special = set(any_tokenizer.get_added_vocab().values())

    def structural(typed: str) -> int:
        system = typed if who == "system" else "x"
        question: Content = (IMAGE, "\n" + (typed if who == "question" else "x"))
        exchange = Exchange(question, typed if who == "answer" else "x")
        ids = TurnEncoder(any_tokenizer, template, 2, system=system).encode([exchange] * 2).input_ids
        return sum(i in special for i in ids)

    assert {typed: structural(typed) for typed in TYPED} == dict.fromkeys(TYPED, structural("x"))


def test_added_tokens_that_are_not_marked_special_stay_text_too() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "<|role|>", "colour"])
    encoder = TurnEncoder(tokenizer, "chatml", 2)
    ids = encoder.encode([Exchange(("a<|role|>",), "<think>b <think><think> colour")]).input_ids
    assert {tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "<|role|>")}.isdisjoint(ids)
    assert tokenizer.convert_tokens_to_ids("colour") in ids  # a word someone added is a word
    assert "a<|role|><|im_end|>\n<|im_start|>assistant\n<think>b <think><think> colour" in tokenizer.decode(ids)


def test_ids_are_those_of_the_tokenizer_itself_whatever_it_was_used_for_before() -> None:
    tokenizer = make_tokenizer()
    encoder = TurnEncoder(tokenizer, "plain", 1)
    tokenizer(["a", "a longer text"], padding="max_length", max_length=40, truncation=True)
    for text in ("What is shown?", "x </s>", " a" * 50):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        tokenizer(["a", "b"], padding="max_length", max_length=3, truncation=True)
        assert encoder.encode([Exchange((IMAGE,), text)]).labels[1:-1] == ids


def test_lone_surrogate_is_refused_with_its_place(tokenizer: Any) -> None:
    encoder = TurnEncoder(tokenizer, "chatml", 2)
    for exchange in (Exchange(("ab\ud800",), "x"), Exchange(("x",), "ab\udfff")):
        with pytest.raises(DataError, match="surrogate at character 2") as caught:
            encoder.encode([exchange])
        assert caught.value.code == "D111"


def test_question_is_split_at_image_marks() -> None:
    assert parse_question("What is it?") == ("What is it?",)
    assert parse_question("<image>\nWhat is it?") == (IMAGE, "\nWhat is it?")
    assert parse_question("What is <image> here?") == (IMAGE, "\nWhat is  here?")  # LLaVA moves the image to the front
    assert parse_question("<image>") == (IMAGE,)
    assert parse_question("One <image> and <image>") == ("One ", IMAGE, " and ", IMAGE)
    assert parse_question(r"Write \<image> here") == ("Write <image> here",)
    assert parse_question(r"<image>What does \<image> mean?") == (IMAGE, "\nWhat does <image> mean?")


@pytest.mark.parametrize("template", TEMPLATES)
def test_generation_prefix_is_what_training_saw_before_the_answer(template: str, any_tokenizer: Any) -> None:
    encoder = TurnEncoder(any_tokenizer, template, 4)
    trained = encoder.encode(conversation(["Yes", "No"]))
    prefix = encoder.encode([*conversation(["Yes"]), Exchange(("ask 1",))])
    assert trained.input_ids[: len(prefix.input_ids)] == prefix.input_ids
    assert prefix.labels == trained.labels[: len(prefix.labels)]
    assert trained.labels[len(prefix.labels)] != IGNORE


def test_independent_turns_share_the_prefix_and_hold_what_single_turns_hold(any_tokenizer: Any) -> None:
    encoder = TurnEncoder(any_tokenizer, "chatml", 4, system="Sys.")
    exchanges = conversation(["Yes", "No", "It is red"])
    packed = encoder.encode(exchanges, independent=True)
    assert set(packed.turns) == {0, 1, 2, 3}
    assert packed.turns == sorted(packed.turns)
    for turn, exchange in enumerate(exchanges, start=1):
        question = exchange.question if turn == 1 else (IMAGE, f"\n{exchange.question[0]}")
        alone = encoder.encode([Exchange(question, exchange.answer)])
        kept = [k for k, t in enumerate(packed.turns) if t in (0, turn)]
        assert [packed.input_ids[k] for k in kept] == alone.input_ids
        assert [packed.labels[k] for k in kept] == alone.labels


def test_conversations_that_do_not_start_with_all_images_keep_their_order(tokenizer: Any) -> None:
    encoder = TurnEncoder(tokenizer, "chatml", 4)
    for exchanges in (
        [Exchange(("a",), "b"), Exchange(("c",), "d")],
        [*conversation(["a"]), Exchange((IMAGE, "x"), "b")],
    ):
        encoding = encoder.encode(exchanges, independent=True)
        assert set(encoding.turns) == {0}
        assert encoding == encoder.encode(exchanges)


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_answer_is_predicted_from_another_turn(template: str, tokenizer: Any) -> None:
    encoding = TurnEncoder(tokenizer, template, 4).encode(conversation(["Yes", "No"]), independent=True)
    for at, label in enumerate(encoding.labels):
        assert label == IGNORE or encoding.turns[at - 1] == encoding.turns[at]


def test_new_tokens_stand_for_themselves_and_no_other_token_does() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<cat>", "<dog>"])
    cat, dog = tokenizer.convert_tokens_to_ids(["<cat>", "<dog>"])
    encoder = TurnEncoder(tokenizer, "chatml", 2, new_tokens=("<cat>",))
    encoding = encoder.encode([Exchange(("What is <cat>?",), "a<cat> </s><dog>")])
    assert encoding.input_ids.count(cat) == 2
    assert encoding.labels.count(cat) == 1
    assert {dog, tokenizer.eos_token_id}.isdisjoint(encoding.input_ids)
    assert supervised_text(tokenizer, encoding) == "a<cat> </s><dog><|im_end|>"


@pytest.mark.parametrize(
    ("template", "says", "fix"),
    [
        ("tokenizer", "no chat template", "use template=vicuna_v1 or vicuna_v1_legacy or phi or gemma"),
        ("chatml", r"no special token <\|im_end\|>", "use template=vicuna_v1 or "),
        ("llama_2", r"a special token \[INST\]", "or phi or gemma"),
    ],
)
def test_template_that_does_not_fit_the_tokenizer_names_those_that_do(template: str, says: str, fix: str) -> None:
    tokenizer = make_plain_tokenizer(("<|im_start|>", "[INST]"))
    with pytest.raises(ModelError, match=f"^\\[M510\\] template={template}, but .* {says}.*Fix: .*{fix}"):
        TurnEncoder(tokenizer, template, 1)


def test_tokenizer_without_eos_is_told_the_line_that_sets_it() -> None:
    tokenizer = make_plain_tokenizer(())
    tokenizer.eos_token = None
    for template in ("vicuna_v1", "llama_2", "phi"):
        with pytest.raises(ModelError, match=r"M510.*no eos token.*set language\.eos=TOKEN"):
            TurnEncoder(tokenizer, template, 1)
    assert TurnEncoder(tokenizer, "plain", 1).encode([Exchange((IMAGE,), "a")]).num_supervised > 0


def make_plain_tokenizer(special: tuple[str, ...]) -> Any:
    """The tiny tokenizer without a chat template, with these special tokens and </s> alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["</s>", *special])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_unknown_template_names_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"M509.*did you mean 'vicuna_v1'"):
        template_of("vicuna", tokenizer)
