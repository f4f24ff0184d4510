"""Generation: batched equals one by one, shared beginnings equal unshared ones, margins, stops, and plain greedy."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from PIL import Image

import vlmpeft
from vlmpeft import decode
from vlmpeft.batch import collate
from vlmpeft.build import Bundle
from vlmpeft.config import load_recipe
from vlmpeft.decode import Answer, Request, exchange_of
from vlmpeft.errors import DataError
from vlmpeft.prefix import can_share
from vlmpeft.template import IMAGE

WORDS = ("Yes", "No")


def lively(model: torch.nn.Module) -> None:
    """Weights large enough that greedy texts vary."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path) -> Bundle:
    made = vlmpeft.build(load_recipe(str(tiny_recipe)))
    language = made.model.language
    language.lm_head.weight = torch.nn.Parameter(torch.zeros_like(language.lm_head.weight))  # untied: no echo
    lively(made.model)
    return made


@pytest.fixture(scope="module")
def pictures(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "images").glob("*.png"))


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    """0, 1 and 2 images, questions of many lengths, several on the same image, marks in other places."""
    questions = ["Is there a red square?", "What?", "Is there a blue image or a yellow photo of a green square? Yes No"]
    made = [Request((pictures[i % 3],), question) for question in questions for i in range(3)]
    made += [Request((), "What is 1 plus 1?"), Request((), "Hello"), Request((pictures[4],), "Is it <image> so?")]
    pair = (pictures[0], pictures[1])
    made += [
        Request(pair, "First <image> or <image> second?"),
        Request(pair, "First <image> or <image> last, in one word?"),
    ]
    return [*made, Request(pair, "Are they alike?"), Request((pictures[1],), questions[0])]


@pytest.fixture(scope="module")
def one_by_one(bundle: Bundle, requests: list[Request]) -> list[Answer]:
    return [bundle.answer([r], contrast=WORDS, max_new_tokens=10)[0] for r in requests]


def same(found: list[Answer], expected: list[Answer], within: float = 1e-4) -> None:
    assert [a.text for a in found] == [a.text for a in expected]
    for first, second in zip(found, expected, strict=True):
        assert first.margin == pytest.approx(second.margin, abs=within)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 64])
def test_batched_answers_equal_those_one_by_one(
    bundle: Bundle, requests: list[Request], one_by_one: list[Answer], batch_size: int
) -> None:
    assert len({a.text for a in one_by_one}) > 10
    same(bundle.answer(requests, batch_size=batch_size, contrast=WORDS, max_new_tokens=10), one_by_one)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "expected"),
    [
        ([6] * 4, 16, [12, 12]),  # two pictures of six questions, not two and two thirds
        ([6] * 5, 32, [30]),
        ([6] * 3, 8, [6, 6, 6]),
        ([6] * 3, 7, [6, 6, 6]),
        ([5] * 3, 8, [8, 7]),  # a batch that would lose more than a quarter takes a part of the next
        ([20, 3], 8, [8, 8, 7]),
        ([1] * 9, 4, [4, 4, 1]),
        ([], 4, []),
    ],
)
def test_batches_rather_end_early_than_read_an_image_twice(
    sizes: list[int], batch_size: int, expected: list[int]
) -> None:
    keys = [key for key, size in enumerate(sizes) for _ in range(size)]
    lengths = [90 - key for key in keys]
    made = decode.plan_batches(keys, lengths, batch_size)
    assert [len(batch) for batch in made] == expected
    assert sorted(i for batch in made for i in batch) == list(range(len(keys)))
    assert [lengths[i] for batch in made for i in batch] == sorted(lengths, reverse=True)


def test_answers_without_shared_beginnings_are_the_same(
    bundle: Bundle, requests: list[Request], one_by_one: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "can_share", lambda language, length: False)
    monkeypatch.setattr(decode, "generate_shared", None)
    same(bundle.answer(requests, batch_size=5, contrast=WORDS, max_new_tokens=10), one_by_one)


def test_an_image_asked_about_often_is_encoded_once_a_batch(bundle: Bundle, pictures: list[Path]) -> None:
    seen: list[int] = []
    hook = bundle.model.vision.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    bundle.answer([Request((pictures[i % 2],), f"What is {i}?") for i in range(8)], batch_size=8, max_new_tokens=3)
    hook.remove()
    assert seen == [2]


def test_questions_about_one_image_go_together_whatever_their_order(bundle: Bundle, pictures: list[Path]) -> None:
    asked = [Request((pictures[i % 4],), "What? " * (1 + i % 3)) for i in range(12)]
    groups: list[list[int]] = []
    bundle.answer(asked, batch_size=3, max_new_tokens=1, on_batch=lambda done: groups.append([i for i, _ in done]))
    assert sorted(i for g in groups for i in g) == list(range(12))
    assert all(len({i % 4 for i in g}) == 1 for g in groups)


@torch.no_grad()
def test_the_margin_is_the_logit_difference_of_a_plain_forward(
    bundle: Bundle, requests: list[Request], one_by_one: list[Answer]
) -> None:
    yes, no = (bundle.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in WORDS)
    for request, expected in zip(requests, one_by_one, strict=True):
        encoded = bundle.turn_encoder().encode([exchange_of(request)])
        images = [bundle.image_transform(Image.open(p).convert("RGB"))[0] for p in request.images]
        batch = collate([encoded], images)
        logits = bundle.model(batch.input_ids, batch.attention_mask, pixel_values=batch.pixel_values).logits[0, -1]
        assert expected.margin == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)


def force(bundle: Bundle, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the language model say these tokens, whatever it is asked."""
    said: dict[int, int] = {}
    head = bundle.model.language.lm_head

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        step = said[0] = said.get(0, -1) + 1
        logits = torch.zeros(*hidden.shape[:-1], head.weight.shape[0])
        logits[..., tokens[min(step, len(tokens) - 1)]] = 1
        return logits

    monkeypatch.setattr(head, "forward", forward)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
def test_an_answer_stops_at_the_end_of_the_template_and_at_eos(
    bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, count: int, end: str
) -> None:
    word, after = (bundle.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" Yes", " No No No"))
    force(bundle, [*word, bundle.tokenizer.convert_tokens_to_ids(end), *after], monkeypatch)
    texts = [a.text for a in bundle.answer([Request((pictures[0],), f"{i}?") for i in range(count)], max_new_tokens=9)]
    assert texts == ["Yes"] * count


def test_a_line_break_stops_the_plain_template_but_not_a_chat(
    bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [i for t in ("A", "\n", "B", "</s>") for i in bundle.tokenizer(t, add_special_tokens=False)["input_ids"]]
    for stage, expected in (("pretrain", "A"), ("instruct", "A\nB")):
        with monkeypatch.context() as patch:
            patch.setattr(bundle, "stage", bundle.recipe.stages[stage])
            force(bundle, ids, patch)
            assert bundle.generate([pictures[0]], "Describe it.", max_new_tokens=8) == expected


def test_a_template_whose_end_begins_with_a_line_break_does_not_stop_there(
    bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bundle.tokenizer.chat_template.replace(
        "message['content'] + '<|im_end|>", "message['content'] + '\n<|im_end|>"
    )
    assert own != bundle.tokenizer.chat_template
    monkeypatch.setattr(bundle.tokenizer, "chat_template", own)
    monkeypatch.setattr(bundle, "stage", dataclasses.replace(bundle.stage, template="tokenizer"))
    pieces = ("A", "\n", "B", "\n", "<|im_end|>", "C")
    force(bundle, [i for t in pieces for i in bundle.tokenizer(t, add_special_tokens=False)["input_ids"]], monkeypatch)
    assert bundle.generate(pictures[0], "Describe it.", max_new_tokens=9) == "A\nB"


def test_an_end_of_several_tokens_stops_at_its_last(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece writes a line break as a space and the break: a space alone is no end."""
    encoder = bundle.turn_encoder()
    monkeypatch.setattr(encoder, "segment_ids", lambda segment: [7, 9] if segment.kind == "end" else [5])
    assert decode.stop_tokens(encoder) == sorted({9, bundle.tokenizer.eos_token_id})


def test_several_captions_of_one_image_under_the_plain_template(
    bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "stage", bundle.recipe.stages["pretrain"])  # its prompt ends with the image
    alone = bundle.generate(pictures[0], "x", max_new_tokens=6)
    assert bundle.generate_batch([(pictures[0], "x")] * 3, max_new_tokens=6) == [alone] * 3


def test_no_more_than_the_asked_tokens(bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    word = bundle.tokenizer("A", add_special_tokens=False)["input_ids"]
    for count in (1, 2):
        with monkeypatch.context() as patch:
            force(bundle, word, patch)
            assert bundle.generate_batch([(pictures[0], "x")] * count, max_new_tokens=4) == ["AAAA"] * count


def test_the_models_own_sampling_settings_do_not_count(
    bundle: Bundle, requests: list[Request], one_by_one: list[Answer]
) -> None:
    language = bundle.model.language
    before = language.generation_config
    odd = {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    language.generation_config = T.GenerationConfig(**odd, num_beams=3, suppress_tokens=list(range(100)), max_length=3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same([bundle.answer([r], contrast=WORDS, max_new_tokens=10)[0] for r in requests[:5]], one_by_one[:5])
        assert language.generation_config.temperature == 0.9
    finally:
        language.generation_config = before


FAMILIES: dict[str, Any] = {
    "gpt_neox": lambda v: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**_sizes(v), intermediate_size=48)),
    "gemma2, wide window": lambda v: _gemma2(v, 512),
    "gemma2, small window": lambda v: _gemma2(v, 16),
    "bloom": lambda v: T.BloomForCausalLM(T.BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4)),
    "gpt2": lambda v: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4)),
}  # fmt: skip


def _gemma2(vocabulary: int, window: int) -> Any:
    heads = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": window}
    return T.Gemma2ForCausalLM(T.Gemma2Config(**_sizes(vocabulary), intermediate_size=48, **heads))


def _sizes(vocabulary: int) -> dict[str, Any]:
    shape = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**shape, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures_answer_batches_as_one_by_one(bundle: Bundle, requests: list[Request], family: str) -> None:
    other = FAMILIES[family](len(bundle.tokenizer)).eval()
    lively(other)
    assert can_share(other, 100) == (family in ("gpt_neox", "gemma2, wide window", "gpt2"))
    before, bundle.model.language = bundle.model.language, other
    try:
        alone = [bundle.answer([r], contrast=WORDS, max_new_tokens=6)[0] for r in requests[:6]]
        same(bundle.answer(requests[:6], batch_size=6, contrast=WORDS, max_new_tokens=6), alone, within=1e-3)
    finally:
        bundle.model.language = before


def test_generate_takes_a_path_a_picture_a_list_or_nothing(bundle: Bundle, pictures: list[Path]) -> None:
    picture = Image.open(pictures[0])
    texts = {bundle.generate(i, "What?", max_new_tokens=6) for i in (pictures[0], str(pictures[0]), picture, [picture])}
    assert len(texts) == 1
    asked = [(pictures[0], "What?"), (None, "What?"), ([pictures[0], pictures[1]], "What?")]
    assert bundle.generate_batch(asked, max_new_tokens=6) == [bundle.generate(i, p, max_new_tokens=6) for i, p in asked]
    assert bundle.generate_batch([]) == []


def test_a_blank_image_has_the_size_and_the_mean_colour(bundle: Bundle, pictures: list[Path]) -> None:
    blank = bundle.blank_image(pictures[1])
    assert blank.size == Image.open(pictures[1]).size
    assert blank.getcolors() == [(blank.width * blank.height, bundle.image_transform.fill)]
    assert bundle.image_transform(blank).abs().max() < 0.02  # the mean, up to 8 bits


@pytest.mark.parametrize(("images", "prompt"), [(1, "<image> <image>?"), (2, "<image>?"), (0, "<image>?")])
def test_marks_and_images_must_agree(bundle: Bundle, pictures: list[Path], images: int, prompt: str) -> None:
    with pytest.raises(DataError, match=rf"D107.*{images} images but {prompt.count('<image>')} <image>"):
        bundle.generate(pictures[:images], prompt)


def test_a_question_without_marks_reads_as_in_training(pictures: list[Path]) -> None:
    assert exchange_of(Request((pictures[0],), " What?\n")).question == (IMAGE, "\nWhat?")
    assert exchange_of(Request((pictures[0],), "<image>\nWhat?")).question == (IMAGE, "\nWhat?")
    assert exchange_of(Request((pictures[0],), r"Is \<image> text?")).question == (IMAGE, "\nIs <image> text?")
    assert exchange_of(Request((pictures[0], pictures[1]), "What?")).question == (IMAGE, IMAGE, "\nWhat?")
    assert exchange_of(Request((), "What?")).question == ("What?",)
