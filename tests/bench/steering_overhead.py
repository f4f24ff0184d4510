"""What MoReS costs a training step: against the same step that trains the projector alone, in turns.

python tests/bench/steering_overhead.py [layers=12] [width=576] [image=576] [rank=1] [positions=ratio:0.01] [batch=1]
                                        [pairs=15] [device=cpu] [dtype=float32]
A Llama with random weights, `image` tokens of an image, 24 of a question and 8 of an answer; forward, backward and
optimizer step, without and with activation checkpointing. Three figures: the ratio of median steps; the time that
passes inside the steering's own forward and backward, as a share of a step; the same share by the count of operations.
The processor's time is counted, so what else the machine does matters little. Give it one core and one thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.forward import checkpoint_activations
from vlmpeft.projectors import PROJECTORS
from vlmpeft.steering import MoReS
from vlmpeft.tune import tune
from vlmpeft.tuners import Full
from vlmpeft.vlm import VLM

FEATURES, QUESTION, ANSWER = 1024, 24, 8
Step = Callable[[], float]


def clock(device: str) -> float:
    """Seconds: of this process on a CPU, of the wall once the device is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def batch(size: int, image: int, generator: torch.Generator) -> dict[str, Tensor]:
    """An image, a question and an answer in every row."""
    words = torch.randint(100, 2000, (size, 1 + QUESTION + ANSWER), generator=generator)
    tokens = torch.full((size, image), IMAGE_TOKEN_ID)
    ids = torch.cat([words[:, :1], tokens, words[:, 1:]], 1)
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORE
    features = torch.randn(size, image, FEATURES, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": features}


def model(options: dict[str, str], tuners: list[Any], checkpointing: bool) -> tuple[VLM, list[nn.Parameter]]:
    """A tuned model in training mode, and what it trains."""
    torch.manual_seed(0)
    width = int(options["width"])
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=int(options["layers"]),
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
    )  # fmt: skip
    dtype = getattr(torch, options["dtype"])
    language = LlamaForCausalLM(config).to(dtype)
    projector = PROJECTORS.build("mlp2x_gelu", FEATURES, width)
    vlm = VLM(nn.Identity(), projector, language).to(options["device"])  # type: ignore[arg-type]
    parameters = list(tune(vlm, tuners).trainable().values())
    checkpoint_activations(vlm.language, checkpointing)
    return vlm.train(), parameters


def stepper(vlm: VLM, parameters: list[nn.Parameter], inputs: dict[str, Tensor], device: str) -> Step:
    """One training step. Returns: its seconds."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        began = clock(device)
        vlm(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return clock(device) - began

    return step


def inside(vlm: Any, inputs: dict[str, Tensor], options: dict[str, str], repeats: int = 20) -> float:
    """Seconds that a step spends in steering: the forward and backward of all units, one behind the other."""
    units, layers = vlm.language.steering.units, int(options["layers"])
    mask = torch.ones_like(inputs["input_ids"]).bool()
    rows, tokens = mask.shape
    like = next(vlm.language.parameters())
    times = []
    for _ in range(repeats):
        routing, _ = vlm.embed(inputs["input_ids"], mask, inputs["labels"], inputs["pixel_values"])
        start = torch.randn(rows, tokens, int(options["width"])).to(like).requires_grad_()
        hidden, gradient = start, torch.randn_like(start)
        began = clock(options["device"])
        for layer in range(layers):
            hidden = units(hidden, layer, routing)
        hidden.backward(gradient)
        times.append(clock(options["device"]) - began)
    return statistics.median(times)


def flops(work: Callable[[], object]) -> int:
    """Multiplications and additions of matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def main(options: dict[str, str]) -> None:
    """Time pairs of steps without and with activation checkpointing, and print the figures."""
    device, generator = options["device"], torch.Generator().manual_seed(0)
    inputs = batch(int(options["batch"]), int(options["image"]), generator)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    steering = MoReS(rank=int(options["rank"]), positions=options["positions"])
    for checkpointing in (False, True):
        plain = model(options, [Full("projector")], checkpointing)
        steered = model(options, [Full("projector"), steering], checkpointing)
        one, other = (stepper(*m, inputs, device) for m in (plain, steered))
        for warm in (one, other):
            warm()
        pairs = [(one(), other()) for _ in range(int(options["pairs"]))]
        base, with_steering = (statistics.median(x) for x in zip(*pairs, strict=True))
        own, counted = inside(steered[0], inputs, options), [flops(s) for s in (one, other)]
        print(
            f"checkpointing {'on' if checkpointing else 'off'}: {1000 * base:.0f} ms projector alone, "
            f"{1000 * with_steering:.0f} ms with steering, ratio of medians {with_steering / base:.3f}, "
            f"of pairs {statistics.median(b / a for a, b in pairs):.3f}; inside steering {1000 * own:.2f} ms, "
            f"{own / base:.2%}; operations {counted[1] / counted[0] - 1:+.4%}"
        )


if __name__ == "__main__":
    defaults = "layers=12 width=576 image=576 rank=1 positions=ratio:0.01 batch=1 pairs=15 device=cpu dtype=float32"
    main(dict(a.split("=", 1) for a in [*defaults.split(), *sys.argv[1:]]))
