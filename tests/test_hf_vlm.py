"""Hugging Face models under our commands: batched as one by one, plain `generate`, our own export, and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import make_language
from native import make_native, native_bundle
from PIL import Image
from tiny_processors import PROCESSORS, make_hf

from vlmpeft import generate
from vlmpeft.build import Bundle
from vlmpeft.decode import Answer, Request
from vlmpeft.errors import EnvironmentFault, ModelError, run_command
from vlmpeft.eval import choice, pope
from vlmpeft.hf_llava import export_hf
from vlmpeft.hf_vlm import HFModel, load_hf

WORDS = ("Yes", "No")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures of different shapes."""
    folder, rng, paths = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i, (height, width) in enumerate(((20, 40), (40, 20), (30, 30))):
        paths.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    questions = ["What?", "Is there a red square?", "Is there a blue image or a photo of a green square?"]
    made = [Request((pictures[i],), question) for i, question in enumerate(questions)]
    made += [Request((pictures[0],), questions[1]), Request((), "Hello"), Request((), "What is 1 plus 1?")]
    return [*made, Request((pictures[0], pictures[1]), "First <image> or <image> second?")]


@pytest.fixture(scope="module", params=PROCESSORS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFModel:
    return load_hf(str(make_hf(tmp_path_factory.mktemp("hf"), request.param)), "cpu", torch.float32)


@pytest.fixture(scope="module")
def one_by_one(model: HFModel, requests: list[Request]) -> list[Answer]:
    return [model.answer([request], max_new_tokens=5, contrast=WORDS)[0] for request in requests]


def test_batched_answers_equal_those_one_by_one(
    model: HFModel, requests: list[Request], one_by_one: list[Answer]
) -> None:
    told: list[Any] = []
    found = model.answer(requests, max_new_tokens=5, contrast=WORDS, batch_size=4, on_batch=told.extend)
    assert [a.text for a in found] == [a.text for a in one_by_one]
    assert [a.margin for a in found] == pytest.approx([a.margin for a in one_by_one], abs=1e-4)
    assert len({a.text for a in found}) > 4
    assert sorted(told) == list(enumerate(found))


def test_an_answer_is_that_of_generate_on_what_the_processor_makes(
    model: HFModel, requests: list[Request], one_by_one: list[Answer], pictures: list[Path]
) -> None:
    processor, image = model.prompts.processor, Image.open(pictures[1])
    content = [{"type": "image"}, {"type": "text", "text": "Is there a red square?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], return_tensors="pt")
    out = model.model.generate(
        **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    said = processor.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    yes, no = (processor.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in WORDS)
    assert one_by_one[1].text == said.strip()
    assert one_by_one[1].margin == pytest.approx(float(out.logits[0][0, yes] - out.logits[0][0, no]), abs=1e-4)


def test_likelihoods_are_the_models_own_loss(model: HFModel, requests: list[Request], pictures: list[Path]) -> None:
    candidates = ("Yes", "A yellow photo")
    asked = [dataclasses.replace(request, candidates=candidates) for request in requests[:5]]
    found = model.likelihoods(asked, batch_size=4)
    processor, image = model.prompts.processor, Image.open(pictures[1])
    content = [{"type": "image"}, {"type": "text", "text": "Is there a red square?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[f"{text} A yellow photo"], images=[[image]], return_tensors="pt")
    tokens = len(processor.tokenizer(" A yellow photo", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = model.model(**inputs).logits[0, -tokens - 1 : -1]
    loss = F.cross_entropy(logits, inputs["input_ids"][0, -tokens:], reduction="sum")
    assert found[1][1].log_probability == pytest.approx(-float(loss), abs=1e-3)
    assert [tuple(f.tokens for f in row) for row in found] == [(1, tokens)] * 5
    for request, row in zip(asked, found, strict=True):
        [alone] = model.likelihoods([request])
        assert [f.log_probability for f in row] == pytest.approx([f.log_probability for f in alone], abs=1e-3)


def test_a_request_with_candidates_is_answered_by_the_likeliest(model: HFModel, requests: list[Request]) -> None:
    asked = [requests[0], dataclasses.replace(requests[1], candidates=WORDS), requests[4]]
    plain, chosen, last = model.answer(asked, max_new_tokens=3, contrast=WORDS)
    [found] = model.likelihoods([asked[1]])
    assert chosen.logliks == pytest.approx([f.log_probability for f in found], abs=1e-3)
    assert chosen.text == WORDS[chosen.logliks.index(max(chosen.logliks))]
    assert chosen.margin == pytest.approx(chosen.logliks[0] - chosen.logliks[1])
    assert plain.logliks is None
    assert last == model.answer([requests[4]], max_new_tokens=3, contrast=WORDS)[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, HFModel]:
    """A model of ours, and the same written for transformers."""
    folder = tmp_path_factory.mktemp("native")
    bundle = native_bundle(make_native(folder))
    bundle.tuned.merge()
    export_hf(bundle, folder / "out")
    return bundle, load_hf(str(folder / "out"), "cpu", torch.float32)


def test_our_own_model_exported_answers_as_before(
    exported: tuple[Bundle, HFModel], requests: list[Request], pictures: list[Path]
) -> None:
    """Pictures are drawn at the encoder's size: how the two sides scale others is compared where images are tested."""
    ours, theirs = exported
    square = [Image.open(path).convert("RGB").resize((32, 32)) for path in pictures]
    asked = [Request((square[i % 3],), r.prompt) for i, r in enumerate(requests[:4])] + requests[4:6]
    expected = ours.answer(asked, max_new_tokens=5, contrast=WORDS)
    found = theirs.answer(asked, max_new_tokens=5, contrast=WORDS)
    assert [a.text for a in found] == [a.text for a in expected]
    assert [a.margin for a in found] == pytest.approx([a.margin for a in expected], abs=1e-3)
    letters = [dataclasses.replace(request, candidates=("A", "B")) for request in asked]  # a token each
    odds = [[a.log_probability - b.log_probability for a, b in m.likelihoods(letters)] for m in (theirs, ours)]
    assert odds[0] == pytest.approx(odds[1], abs=1e-3)  # the export has more rows, which share in the probability


def test_an_image_token_typed_in_a_question_is_text(model: HFModel, pictures: list[Path]) -> None:
    token = model.prompts.image_token
    asked = Request((pictures[0],), f"What does \\{token} mean?" if token == "<image>" else f"What does {token} mean?")
    assert isinstance(model.answer([asked], max_new_tokens=2)[0].text, str)


def test_the_models_own_sampling_settings_do_not_count(model: HFModel, requests: list[Request]) -> None:
    own = model.model.generation_config
    expected = model.answer(requests[:1], max_new_tokens=5)
    odd = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "num_beams": 3}
    model.model.generation_config = hf.GenerationConfig(**odd, eos_token_id=own.eos_token_id)
    try:
        assert model.answer(requests[:1], max_new_tokens=5) == expected
    finally:
        model.model.generation_config = own


def test_a_blank_image_has_the_size_and_the_mean_colour(model: HFModel, pictures: list[Path]) -> None:
    mean = model.prompts.processor.image_processor.image_mean
    blank = model.blank_image(pictures[0])
    assert blank.size == Image.open(pictures[0]).size
    assert blank.getpixel((0, 0)) == tuple(int(255 * value) for value in mean)


def test_the_commands_take_it(tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    name = f"model=hf:{make_hf(tmp_path / 'm', 'llava')}"
    rows = [
        {"question_id": i, "image": f"{i % 3}.png", "text": f"Is there a {w}?", "label": ("yes", "no")[i % 2]}
        for i, w in enumerate(["dog", "cat", "red square", "photo"])
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [name, f"images={pictures[0].parent}", "max_new_tokens=3", "device=cpu"]
    assert run_command(pope.main, [*common, f"questions={tmp_path / 'q.jsonl'}", f"out={tmp_path / 'pope'}"]) == 0
    assert json.loads((tmp_path / "pope" / "metrics.json").read_text())["n"] == 4
    item = {"id": "a", "image": "0.png", "question": "Which?", "options": ["red", "green"], "answer": "A"}
    (tmp_path / "c.jsonl").write_text(json.dumps(item) + "\n")
    blank = ["ablate=blank", f"data={tmp_path / 'c.jsonl'}", f"out={tmp_path / 'choice'}"]
    assert run_command(choice.main, [*common, *blank]) == 0
    capsys.readouterr()
    assert run_command(generate.main, [name, f"image={pictures[0]}", "prompt=What?", "max_new_tokens=4"]) == 0
    said = load_hf(str(tmp_path / "m"), "cpu").generate(pictures[0], "What?", max_new_tokens=4)
    assert capsys.readouterr().out == said + "\n"


def test_a_processor_without_a_chat_template_is_one_line(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "m", "llava")
    (folder / "chat_template.jinja").unlink()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"M519.*no chat template"):
        load_hf(str(folder), "cpu")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'][-1]['text'] }}", "does not show an image and a text"),
        ("{% for m in messages %}<image>{% endfor %}", "does not show an image and a text"),
        ("{{ raise_exception('only for adults') }}", "fails: only for adults"),
    ],
)
def test_a_chat_template_that_cannot_ask_about_an_image_is_one_line(
    tmp_path: Path, template: str, message: str
) -> None:
    folder = make_hf(tmp_path / "m", "llava")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=f"M519.*{message}"):
        load_hf(str(folder), "cpu")


def test_a_text_only_model_and_a_folder_without_a_processor_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"M519.*it is a llama model.*AutoModelForImageTextToText"):
        load_hf(str(make_language(tmp_path / "text")), "cpu")
    folder = make_hf(tmp_path / "m", "llava")
    for file in folder.glob("*processor*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"M519.*no image processor|M547"):
        load_hf(str(folder), "cpu")


def test_what_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentFault, match="E420"):
        load_hf("nobody/nothing-here", "cpu")
    folder = make_hf(tmp_path / "m", "llava")

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Package `num2words` is required. Install it with `pip install num2words`.")

    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(EnvironmentFault, match=r"E411.*pip install num2words"):
        load_hf(str(folder), "cpu")
