"""Runs on a quantised base: the shipped recipe, checkpoints, merging, and what stops a run before it starts."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from quant_models import quantised_layers
from runs import FAST, in_child, make_bundle, metrics, outcome, run_train, signal_at, some_logits
from safetensors.torch import load_file

import vlmpeft
from vlmpeft import loop, merge, train
from vlmpeft.build import Bundle
from vlmpeft.checkpoint import save
from vlmpeft.config import load_recipe
from vlmpeft.errors import EnvironmentFault, run_command
from vlmpeft.manifest import verify
from vlmpeft.preflight import refuse_sharded

QUANT = ("quant.bits=4", "quant.compute=fp32")
EIGHT_BIT = ("stages.pretrain.optim.name=adamw8bit", "stages.instruct.optim.name=paged_adamw8bit")
RANKS = "stages.instruct.lora.r=128"  # 4096 weights an adapter matrix: enough for moments of 8 bits
EVERY = "run.save_every=2"


def test_the_recipe_trains_the_tiny_parts(language_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """In bf16, as it is; in a process of its own, as accelerate has one precision a process."""
    tiny = [
        "vision=timm:test_efficientnet", "vision.weights=random", "vision.layer=-1", "vision.image_size=64",
        f"language={language_dir}", f"data.instruct={data_dir / 'instruct.json'}", f"data.images={data_dir / 'images'}",
        "data.workers=0", "batch.size=4", "batch.micro=4", "optim.lr=1e-2", "optim.epochs=2", "run.device=cpu",
    ]  # fmt: skip
    command = [sys.executable, "-m", "vlmpeft.train", "recipe=llava_qlora", *tiny, f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(train.__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert "quant: nf4, blocks of 64, scales of 8 bits, products in bf16; on a CPU" in done.stdout
    assert "weights: " in done.stdout
    assert "optim.name=paged_adamw32bit: no CUDA here to page with" in done.stdout
    losses = [float.fromhex(row["loss"]) for row in metrics(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    bundle = vlmpeft.load(tmp_path / "run" / "final", device="cpu")
    assert len(quantised_layers(bundle.model)) == 14
    assert {name for name, a in bundle.tuned.applied.items()} == {"lora", "projector"}


@pytest.fixture
def bundle(tiny_recipe: Path) -> Bundle:
    return make_bundle(tiny_recipe, *QUANT)


@pytest.fixture
def directory(bundle: Bundle, tmp_path: Path) -> Path:
    save(bundle, tmp_path / "final")
    return tmp_path / "final"


def test_a_checkpoint_records_quantisation_and_comes_back_quantised(bundle: Bundle, directory: Path) -> None:
    expected = {"bits": 4, "type": "nf4", "double": True, "compute": "fp32", "block": 64}
    assert verify(directory)["quant"] == expected
    loaded = vlmpeft.load(directory, device="cpu")
    assert torch.equal(some_logits(loaded), some_logits(bundle))
    assert quantised_layers(loaded.model).keys() == quantised_layers(bundle.model).keys() != set()


def test_merging_goes_into_the_original_weights(directory: Path, tmp_path: Path) -> None:
    whole = vlmpeft.load(directory, device="cpu", quantised=False)
    assert not quantised_layers(whole.model)
    with whole.tuned.disable():
        plain = some_logits(whole)
    assert run_command(merge.main, [f"model={directory}", f"out={tmp_path / 'merged'}"]) == 0
    merged = vlmpeft.load(tmp_path / "merged", device="cpu")
    assert merged.recipe.quant.bits is verify(tmp_path / "merged")["quant"] is None
    assert (some_logits(merged) - some_logits(whole)).abs().max() <= 1e-5
    assert (some_logits(merged) - plain).abs().max() > 1e-2


def test_stock_peft_on_transformers_own_quantisation_gives_the_same_logits(
    bundle: Bundle, directory: Path, language_dir: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base: Any = AutoModelForCausalLM.from_pretrained(language_dir, dtype=torch.float32, quantization_config=asked)
    assert len(quantised_layers(base)) == len(quantised_layers(bundle.model))
    for layer in quantised_layers(base).values():
        layer.support_avx512bf16_for_cpu = False
    theirs = PeftModel.from_pretrained(base, str(directory / "adapters" / "lora")).eval()
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        found, expected = theirs(ids).logits, bundle.model.eval()(ids).logits
        with bundle.tuned.disable():
            plain = bundle.model(ids).logits
    assert (found - expected).abs().max() <= 1e-5
    assert (plain - expected).abs().max() > 1e-2


@pytest.fixture(scope="module")
def straight(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert run_train(tiny_recipe, directory, *QUANT, *EIGHT_BIT, RANKS, EVERY) == 0
    return directory


def test_a_killed_run_with_moments_of_8_bits_goes_on_bit_for_bit(
    tiny_recipe: Path, straight: Path, tmp_path: Path
) -> None:
    def work() -> int:
        signal_at(loop.StageTrainer, "_gradients", 10)
        return run_train(tiny_recipe, tmp_path / "run", *QUANT, *EIGHT_BIT, RANKS, EVERY)

    assert in_child(work) == -signal.SIGKILL
    assert run_train(tiny_recipe, tmp_path / "run", *QUANT, *EIGHT_BIT, RANKS, EVERY) == 0
    assert outcome(tmp_path / "run") == outcome(straight)


def test_moments_lie_in_8_bits_in_a_checkpoint(straight: Path) -> None:
    newest = sorted(straight.glob("checkpoints/step-*/optimizer.safetensors"), key=lambda p: p.stat().st_mtime)[-1]
    state = load_file(newest)
    adapter = {k: v for k, v in state.items() if "q_proj.lora_A" in k}
    entries = {"step", *(f"{name}{i}" for name in ("state", "absmax", "qmap") for i in (1, 2))}
    assert {k.partition("|")[2] for k in adapter} == entries
    assert {v.dtype for k, v in adapter.items() if k.partition("|")[2] in ("state1", "state2")} == {torch.uint8}


def test_a_run_without_bitsandbytes_stops_before_it_begins(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for override, way_out in (("quant.bits=8", "quant=null"), (EIGHT_BIT[0], "optim.name=adamw")):
        assert run_train(tiny_recipe, tmp_path / "run", override) == 6
        error = capsys.readouterr().err
        assert "E410" in error
        assert way_out in error
    assert not (tmp_path / "run").exists()


def test_two_processes_train_what_one_does(tiny_recipe: Path, tmp_path: Path) -> None:
    few = ("stages.pretrain=null", "stages.instruct.lora.dropout=0", "stages.instruct.optim.steps=2")
    assert run_train(tiny_recipe, tmp_path / "one", *QUANT, *few) == 0
    two = in_processes(lambda _: run_train(tiny_recipe, tmp_path / "two", *QUANT, *few), tmp_path / "log")
    assert two == [0, 0], (tmp_path / "log" / "out-0.txt").read_text()
    for name in ("adapters/lora/adapter_model.safetensors", "projector.safetensors"):
        one, found = (load_file(tmp_path / run / "final" / name) for run in ("one", "two"))
        assert all(torch.allclose(found[key], one[key], atol=1e-5) for key in one), name


@pytest.mark.parametrize("override", ["quant.bits=4", EIGHT_BIT[1]])
def test_fsdp_is_refused(override: str, tiny_recipe: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"E433.*ddp.yaml"):
        refuse_sharded(load_recipe(str(tiny_recipe), [*FAST, override]))
    refuse_sharded(load_recipe(str(tiny_recipe), FAST))
