"""Training cost of one conversation with independent turns against the same turns as separate samples.

python tests/bench/independent_turns.py [layers=6] [turns=5] [repeats=7]
Both sides run alternately in one process on random weights of SmolLM2-135M's widths; the figure is a ratio of medians.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID, Batch, collate
from vlmpeft.projectors import MLPProjector
from vlmpeft.template import Encoding
from vlmpeft.tune import tune
from vlmpeft.tuners import Full, LoRA
from vlmpeft.vlm import VLM

IMAGE_TOKENS, QUESTION, ANSWER = 49, 20, 3


def conversation(turns: int) -> list[Encoding]:
    """One image, then `turns` questions of its own each, as one packed sample."""
    packed = Encoding()
    packed.add([IMAGE_TOKEN_ID] * IMAGE_TOKENS, supervised=False, turn=0)
    for turn in range(1, turns + 1):
        packed.add(list(range(10, 10 + QUESTION)), supervised=False, turn=turn)
        packed.add(list(range(40, 40 + ANSWER)), supervised=True, turn=turn)
    return [packed]


def single_turns(turns: int) -> list[Encoding]:
    """The same questions, each with the image."""
    samples = []
    for _ in range(turns):
        sample = Encoding()
        sample.add([IMAGE_TOKEN_ID] * IMAGE_TOKENS + list(range(10, 10 + QUESTION)), supervised=False, turn=0)
        sample.add(list(range(40, 40 + ANSWER)), supervised=True, turn=0)
        samples.append(sample)
    return samples


def seconds(model: VLM, batch: Batch) -> float:
    """One forward and backward."""
    start = time.perf_counter()
    model(**batch.tensors()).loss.backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main(layers: int = 6, turns: int = 5, repeats: int = 7, images: int = 4) -> None:
    """Print both medians and their ratio."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = VLM(torch.nn.Identity(), MLPProjector(1280, 576), LlamaForCausalLM(config))
    tune(model, [LoRA(r=16), Full("projector")])
    features = [torch.randn(IMAGE_TOKENS, 1280) for _ in range(images)]
    packed = collate(conversation(turns) * images, features)
    single = collate(single_turns(turns) * images, [f for f in features for _ in range(turns)])
    assert int((packed.labels != IGNORE).sum()) == int((single.labels != IGNORE).sum())
    times: dict[str, list[float]] = {"independent": [], "single": []}
    for repeat in range(repeats + 1):
        a, b = seconds(model, packed), seconds(model, single)
        if repeat:  # the first round warms up
            times["independent"].append(a)
            times["single"].append(b)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        {name: round(value, 3) for name, value in medians.items()},
        f"single / independent = {medians['single'] / medians['independent']:.2f}",
    )


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (a.split("=") for a in sys.argv[1:])})
