"""AdaLoRA trained by two gloo processes: the same singular values go, and the same weights are left, as with one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from processes import curve, in_processes, same_run, weights
from runs import run_train
from safetensors.torch import load_file, save_file
from tiny_models import hf_inputs, hf_llava
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlmpeft import Steps, tune
from vlmpeft.tuners import AdaLoRA
from vlmpeft.tuners.adalora import KEPT

TOTAL = 6


def rows(step: int) -> dict[str, Tensor]:
    """A batch of four, with as many supervised tokens in each row."""
    one = hf_inputs()
    ids, labels = (one[key].repeat(4, 1) for key in ("input_ids", "labels"))
    words = (torch.arange(4)[:, None] * 7 + torch.arange(3) + 11 * step) % 90
    ids[:, -3:], labels[:, -3:] = words, words
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def train(file: Path, rank: int, world: int) -> None:
    """A loop of one's own, in which every process sees its rows of each batch."""
    model: nn.Module = hf_llava()
    tuned = tune(model, {"it": AdaLoRA(1, 3, targets="minimal", tinit=0.1, tfinal=0.3)})
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2, eps=1e-3)
    steps = Steps(tuned, TOTAL, processes=world)
    if world > 1:
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    for step in range(TOTAL):
        steps.before(step)
        model(**{key: value[rank::world] for key, value in rows(step).items()}).loss.backward()
        steps.add_gradients()
        optimizer.step()
        steps.after(step)
        optimizer.zero_grad()
    found = {**steps.tensors(), **tuned.trainable()}
    save_file({key: value.detach().clone() for key, value in found.items()}, file)


def test_in_a_loop_of_ones_own_two_processes_decide_as_one_does(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        train(tmp_path / f"of-two-{rank}", rank, int(os.environ["WORLD_SIZE"]))

    train(tmp_path / "alone", 0, 1)
    assert in_processes(work, tmp_path / "log") == [0, 0]
    alone, first, second = (load_file(tmp_path / name) for name in ("alone", "of-two-0", "of-two-1"))
    kept = [key for key in alone if key.endswith(KEPT)]
    assert sum(int(alone[key].sum()) for key in kept) == len(kept) == 4
    assert all(first[key].equal(alone[key]) for key in kept)
    assert all(first[key].equal(second[key]) for key in first)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


def test_two_processes_of_the_command_decide_as_one_does(tiny_recipe: Path, tmp_path: Path) -> None:
    changes = (
        "stages.pretrain=null", "stages.instruct.tuners.lora=null", "stages.instruct.batch.group=none",
        "stages.instruct.tuners.own={kind: adalora, r: 1, init_r: 2, tinit: 0.1, tfinal: 0.3, lr: 1e-2}",
        "stages.instruct.batch.size=6", "stages.instruct.optim.eps=0.1", "stages.instruct.optim.steps=4",
        "run.timeout_s=50",
    )  # fmt: skip

    def work(_: int) -> int:
        return run_train(tiny_recipe, tmp_path / os.environ["WORLD_SIZE"], *changes)

    for count in (1, 2):
        assert in_processes(work, tmp_path / f"log-{count}", count) == [0] * count
    one, two = tmp_path / "1", tmp_path / "2"
    same_run(two, one)
    assert curve(two, "own_budget") == curve(one, "own_budget")
    found, expected = ({k: t for k, t in weights(run).items() if "lora_E" in k} for run in (two, one))
    assert sum(int((t != 0).sum()) for t in expected.values()) == len(expected) > 0
    assert all((found[key] == 0).equal(t == 0) for key, t in expected.items())
