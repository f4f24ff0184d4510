"""`vlmpeft adapters`: merged folders and soups from the command line, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native import logits_of, make_native, native_bundle
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import vlmpeft
from vlmpeft import adapters
from vlmpeft.checkpoint import save
from vlmpeft.errors import run_command
from vlmpeft.manifest import verify

FILES = ("adapters/lora/adapter_model.safetensors", "projector.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories of one recipe: two alike, one of another rank, all on the same parts."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = make_native(folder)
    for seed, (name, changes) in enumerate({"a": [], "b": [], "c": ["stages.instruct.lora.r=2"]}.items()):
        save(native_bundle(recipe, *changes, seed=seed), folder / name)
    return {name: folder / name for name in "abc"} | {"llm": folder / "llm"}


def run(*arguments: object) -> int:
    return run_command(adapters.main, [str(a) for a in arguments])


def test_merge_writes_a_folder_that_peft_loads(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("merge", f"a={runs['a']}", f"c={runs['c']}", f"b={runs['b']}", "weights=[1,0.5,-2]", f"out={out}") == 0
    text = capsys.readouterr().out
    assert "exact" in text
    assert f"{out} (linear, 14 layers, rank 10)" in text
    ids = torch.tensor([[7, 8, 9]])

    def stock(*folders: Path) -> Any:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs["llm"]), *folders).eval()

    plain: Any = AutoModelForCausalLM.from_pretrained(runs["llm"])
    with torch.no_grad():
        for name, weight in (("a", 1.0), ("b", 0.5), ("c", -2.0)):  # weights go by letter
            theirs = stock(runs[name] / "adapters" / "lora").base_model.model
            for path, module in plain.named_modules():
                if hasattr(layer := theirs.get_submodule(path), "get_delta_weight"):
                    module.weight += weight * layer.get_delta_weight("default")
        expected = plain(ids).logits
        assert (stock(out)(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        (["method=svd", "r=3"], 3), (["method=ties", "density=0.5"], 8),
        (["method=dare_ties", "density=0.5", "r=5"], 5),
        (["method=dare_linear", "density=0.7", "seed=4", "r=full"], 32),
    ],
)  # fmt: skip
def test_lossy_methods_print_the_error_of_every_layer(
    options: list[str], rank: int, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", f"a={runs['a']}", f"b={runs['b']}", f"out={tmp_path / 'out'}", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(f"14 layers, rank {rank})")
    table = dict(line.split() for line in lines if line.startswith("  "))
    assert len(table) == 14 + 1
    assert table["model.layers.0.self_attn.q_proj"]
    exact = float(table["all"]) <= 1e-5
    assert exact is ("r=full" in options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)


def test_a_soup_is_the_mean_of_what_was_trained_as_a_model_directory(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "soup"
    assert run("soup", f"runs=[{runs['a']}, {runs['b']}]", f"out={out}") == 0
    assert f"{out} (the mean of 2 runs)" in capsys.readouterr().out
    for file in FILES:
        one, other, mean = (load_file(folder / file) for folder in (runs["a"], runs["b"], out))
        assert mean.keys() == one.keys()
        for key, tensor in mean.items():
            torch.testing.assert_close(tensor, (one[key] + other[key]) / 2, rtol=1e-6, atol=1e-7)
    manifest = verify(out)
    assert manifest["soup"] == [str(runs["a"]), str(runs["b"])]
    assert manifest["base"] == verify(runs["a"])["base"]
    loaded, first = (vlmpeft.load(folder, device="cpu") for folder in (out, runs["a"]))
    assert not torch.allclose(logits_of(loaded.model), logits_of(first.model), atol=1e-3)


def test_a_soup_of_one_run_twice_is_that_run(runs: dict[str, Path], tmp_path: Path) -> None:
    assert run("soup", f"runs=[{runs['a']},{runs['a']}]", f"out={tmp_path / 'same'}") == 0
    for file in FILES:
        ours, theirs = load_file(tmp_path / "same" / file), load_file(runs["a"] / file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_wrong_arguments_are_refused_in_a_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = f"a={runs['a']}", f"b={runs['b']}", f"out={tmp_path / 'x'}"
    for arguments, status, says in (
        (["mrege", a, b, out], 2, "[C100] adapters mrege: no such action; did you mean 'merge'?"),
        (["merge", a, out], 2, "[C102] b is not given"),
        (["merge", a, b, out, "metod=ties"], 2, "[C101] no key 'metod'; did you mean 'method'?"),
        (["merge", a, b, out, "method=tie"], 2, "did you mean 'ties'?"),
        (["merge", a, b, out, "weights=[1]"], 2, "[C102] 1 weights for 2 adapters"),
        (["merge", a, b, out, "weights=[1,x]"], 2, "[C102] weights=x: expected a number"),
        (["merge", a, b, out, "method=svd", "r=-3"], 2, "[C102] r=-3: expected an integer"),
        (["merge", a, b, out, "r=3"], 2, "[C102] method=linear keeps every rank"),
        (["merge", a, b, f"out={runs['a']}"], 2, "[C112]"),
        (["merge", a, "b=nowhere", out], 4, "[M581] no directory nowhere"),
        (["soup", f"runs=[{runs['a']}]", out], 2, "[C102] a soup of 1 runs"),
        (["soup", f"runs=[{runs['a']},{runs['c']}]", out], 4, "[M582]"),
        (["soup", f"runs=[{runs['a']},{tmp_path}]", out], 5, "[K202]"),
    ):
        assert run(*arguments) == status, arguments
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_help_names_the_actions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "adapters soup runs=" in capsys.readouterr().out
