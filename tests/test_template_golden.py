"""Legacy-exact templates: ids and labels are those LLaVA's own preprocessing gives for a slow Llama tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.template import IMAGE, TEMPLATES, Exchange, TurnEncoder, parse_question

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden" / "llava_preprocess.json").read_text())
LLAVA_IMAGE = -200
SAMPLES = [(name, i) for name, rows in GOLDEN.items() if name != "how" for i in range(len(rows))]


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(HERE / "fixtures" / "llama_tokenizer", trust_remote_code=False)


def conversation(turns: list[str], image: bool) -> list[Exchange]:
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [Exchange(parse_question(q) if image else (q,), a) for q, a in pairs]


@pytest.mark.parametrize(("template", "index"), SAMPLES)
def test_ids_and_labels_are_those_of_llava(template: str, index: int, llama: Any) -> None:
    sample = GOLDEN[template][index]
    encoding = TurnEncoder(llama, template, image_tokens=1).encode(conversation(sample["turns"], sample["image"]))
    assert [LLAVA_IMAGE if i == IMAGE_TOKEN_ID else i for i in encoding.input_ids] == sample["ids"]
    if sample["supervised"]:
        inside = {i for start, stop in sample["supervised"] for i in range(start, stop)}
        assert encoding.labels == [x if i in inside else IGNORE for i, x in enumerate(encoding.input_ids)]


def test_a_sample_that_llava_drops_is_trained_here(llama: Any) -> None:
    """LLaVA looks for " ASSISTANT: " in the text; an answer that holds it costs the sample all of its labels."""
    dropped = [s for s in GOLDEN["vicuna_v1_legacy"] if not s["supervised"]]
    assert len(dropped) == 2
    for sample in dropped:
        encoder = TurnEncoder(llama, "vicuna_v1_legacy", image_tokens=1)
        encoding = encoder.encode(conversation(sample["turns"], sample["image"]))
        spelled = llama.decode([x for x in encoding.labels if x != IGNORE])
        assert spelled == "".join(f" {a}</s>" for a in sample["turns"][1::2]).lstrip()


CLOSINGS = {"plain": "\n", "llama_2": " </s>", "mistral": " </s>"}  # of the others: </s>


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("chatml", "tokenizer")])
def test_space_in_front_of_an_answer_counts_with_sentencepiece_too(template: str, llama: Any) -> None:
    encoder = TurnEncoder(llama, template, image_tokens=1)
    before = llama.convert_tokens_to_ids(":")  # a decoder drops the first space of a text
    prompts = set()
    for answer in ("Yes", " Yes", "  Yes", "\nYes", " \n7"):
        encoding = encoder.encode([Exchange((IMAGE, "\nIs it?"), answer)])
        supervised = [x for x in encoding.labels if x != IGNORE]
        assert llama.decode([before, *supervised]) == f": {answer}{CLOSINGS.get(template, '</s>')}"
        prompts.add(tuple(encoding.input_ids[: len(encoding.labels) - len(supervised)]))
    assert len(prompts) == 1


def test_the_golden_samples_are_mixed() -> None:
    samples = GOLDEN["vicuna_v1_legacy"]
    assert len(samples) == 50
    assert 10 <= sum(s["image"] for s in samples) <= 40
    answers = [a for s in samples for a in s["turns"][1::2]]
    assert {a[0] for a in answers} >= {" ", "\n", "\t", "1", "é"}
    assert max(len(s["turns"]) for s in samples) >= 8
