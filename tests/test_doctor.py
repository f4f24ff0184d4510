"""`vlmpeft doctor`: a healthy run passes and leaves nothing, and each fault is named where it is."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmpeft import checkpoint, doctor, fs, round_trip
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.build import Bundle, build
from vlmpeft.config import load_recipe
from vlmpeft.errors import CheckpointError, NumericError, run_command
from vlmpeft.gradient_flow import Flow, require_falling
from vlmpeft.steps import Steps
from vlmpeft.template import TurnEncoder

FAST = ("vision.image_size=64", "stages.pretrain=null")
ODD = "imports=[odd_projectors]"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def examine(tiny_recipe: Path, tmp_path: Path, capsys: Captured) -> Any:
    """Run the command. Returns: exit status, and the findings as (status, where, check): line."""

    def run(*overrides: str, fast: tuple[str, ...] = FAST) -> tuple[int, dict[str, list[Any]]]:
        arguments = [f"recipe={tiny_recipe}", f"run.dir={tmp_path / 'run'}", *fast, *overrides]
        status = run_command(doctor.main, [*arguments, "--json"])
        found: dict[str, list[Any]] = {"ok": [], "note": [], "FAIL": []}
        out = json.loads(capsys.readouterr().out)
        for check in out["checks"]:
            found[check["status"]].append(check)
        assert (out["exit_status"], out["ready"]) == (status, status == 0)
        assert not (tmp_path / "run").exists()
        return status, found

    return run


def texts(found: list[Any], check: str) -> list[str]:
    return [f["text"] for f in found if f["check"] == check]


def test_a_healthy_run_passes_every_check_of_both_stages(tiny_recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    overrides = [f"recipe={tiny_recipe}", FAST[0], f"run.dir={tmp_path / 'run'}"]
    assert run_command(doctor.main, overrides) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"ready to train: {len(lines) - 1} ok, 0 notes, 0 failed"
    assert all(line.startswith("ok   ") for line in lines[:-1])
    said = "\n".join(lines)
    for stage in ("pretrain", "instruct"):
        for check in (
            "trains",
            "records",
            "batch",
            "labels",
            "image tokens",
            "gradients",
            "frozen",
            "loss",
            "checkpoint",
        ):
            assert f"\nok   {stage} {check}: " in said
    assert "instruct records: records 16 = used 16 + skipped 0; supervised 10.4% of 1,112 tokens" in said
    assert "samples without one 4" in said
    assert "is taught: Yes<|im_end|> | No<|im_end|> | A " in said
    assert "'lora' 28 tensors, 14 of them from a later step on; 'projector' 4 tensors" in said  # 14 layers' A and B
    assert said.count("equal logits, bit for bit") == 2
    assert not (tmp_path / "run").exists()


def test_without_a_recipe_it_says_what_to_write(capsys: Captured) -> None:
    assert run_command(doctor.main, ["run.dir=x"]) == 2
    assert "recipe=NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "status", "where", "code", "says"),
    [
        (["stages.instruct.lora.targets=[q_prj]"], 4, "instruct tuners", "M550", "q_proj"),
        (["data.images=nowhere"], 2, "run recipe", "C110", "no such folder"),
        (["run.device=cuda:99"], 6, "run machine", "E412", "cuda:99"),
        (["vision=timm:no_such_model"], 4, "run model", "M543", "no_such_model"),
        (["data.max_length=16", "data.truncate=error"], 3, "instruct records", "D100", "data.max_length is 16"),
        ([ODD, "projector=detached"], 4, "instruct gradients", "M593", "'projector'"),
        ([ODD, "projector=half_used"], 4, "instruct gradients", "M593", "projector.unused"),
        ([ODD, "projector=miscounting"], 4, "instruct batch", "M515", "placeholders"),
        ([ODD, "projector=overflowing"], 7, "instruct gradients", "N301", "samples i"),
        ([ODD, "projector=forgetful"], 5, "instruct checkpoint", "K208", "logits"),
    ],
    ids=str,
)  # fmt: skip
def test_a_fault_is_named(overrides: list[str], status: int, where: str, code: str, says: str, examine: Any) -> None:
    got, found = examine(*overrides)
    failed = found["FAIL"][0]
    assert (got, f"{failed['where']} {failed['check']}", failed["code"]) == (status, where, code)
    assert says in failed["text"] + failed["fix"]


def test_a_missing_image_is_named_with_its_record(examine: Any, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir / "images", tmp_path / "images")
    (tmp_path / "images" / "003.png").unlink()
    status, found = examine(f"data.images={tmp_path / 'images'}")
    assert status == 3
    assert texts(found["FAIL"], "records")[0].endswith("no image '003.png'.") or "003.png" in found["FAIL"][0]["text"]
    assert 'id="i3"' in found["FAIL"][0]["text"]


@pytest.mark.parametrize(("supervise", "code"), [((), "D100"), (("text", "fixed", "answer", "end"), "D113")])
def test_labels_that_are_not_the_answers_are_seen(
    supervise: tuple[str, ...], code: str, examine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template whose labels are wrong: none at all, or the question's too."""

    def append(self: TurnEncoder, out: Any, segments: Any, turn: int, shown: Any) -> None:
        for segment in segments:
            image = segment.kind == "image"
            ids = [IMAGE_TOKEN_ID] * self.tokens_of(next(shown)) if image else self.segment_ids(segment)
            out.add(ids, segment.kind in supervise, turn, segment.user)

    monkeypatch.setenv("VLMPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TurnEncoder, "_append", append)
    status, found = examine()
    assert (status, found["FAIL"][0]["code"]) == (3, code)


def test_base_weights_with_nan_are_named(examine: Any, language_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(language_dir, tmp_path / "lm")
    file = tmp_path / "lm" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    status, found = examine(f"language={tmp_path / 'lm'}")
    assert (status, found["FAIL"][0]["code"]) == (4, "M595")
    assert "language.model.layers.1.mlp.up_proj.weight" in found["FAIL"][0]["text"]


def test_a_projector_to_start_from_with_nan_is_named(examine: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    bundle: Bundle = build(load_recipe(str(tiny_recipe), [FAST[0], "stages.instruct=null"]))
    with torch.no_grad():
        next(bundle.model.projector.parameters())[0] = torch.nan
    checkpoint.save(bundle, tmp_path / "start")
    status, found = examine(f"init={tmp_path / 'start'}")
    assert (status, found["FAIL"][0]["code"], found["FAIL"][0]["check"]) == (4, "M503", "model")


def test_a_missing_package_is_named(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    status, found = examine("stages.instruct.optim.name=adamw8bit")
    assert (status, found["FAIL"][0]["code"]) == (6, "E410")


def test_a_full_disk_is_seen_before_the_run_fills_it(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fs.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 150_000, 150_000))
    status, found = examine("run.save_every=1")
    assert (status, [(f["check"], f["code"]) for f in found["FAIL"]]) == (5, [("disk", "K201")])


def test_a_frozen_weight_that_changes_is_named(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(self: Steps) -> dict[str, Any]:
        self.tuned.parts.lm_head.weight.data[0, 0] += 1
        return {}

    monkeypatch.setattr(Steps, "add_gradients", leak)
    status, found = examine()
    assert (status, found["FAIL"][0]["code"]) == (4, "M594")
    assert "language.model.embed_tokens.weight changed" in found["FAIL"][0]["text"]  # the head is tied to it


def test_what_cannot_have_a_gradient_is_explained(examine: Any, data_dir: Path, tmp_path: Path) -> None:
    mores = "stages.instruct.mores={rank: 1, positions: all, site: block_output}"
    records = [r for r in json.loads((data_dir / "instruct.json").read_text()) if "image" not in r]
    (tmp_path / "text.json").write_text(json.dumps(records))
    status, found = examine("stages.instruct.lora=null", mores)
    assert status == 0
    assert texts(found["note"], "gradients") == [
        "tuner 'mores': 3 without gradient: behind the last attention an image token reaches no answer"
    ]
    status, found = examine(f"data.instruct={tmp_path / 'text.json'}")
    assert status == 0
    assert "no sample has an image" in texts(found["note"], "images")[0]
    assert texts(found["note"], "gradients") == ["tuner 'projector': 4 without gradient: the batch has no image"]


def test_samples_that_lose_their_end_are_counted(examine: Any) -> None:
    status, found = examine("data.max_length=60")
    assert status == 0
    assert texts(found["note"], "cut") == ["12 samples lose their end at data.max_length=60"]


def test_a_run_that_goes_on_is_examined_from_there(tiny_recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    from runs import FAST as SHORT
    from runs import run_train

    overrides = ["stages.pretrain=null", "stages.instruct.optim.steps=2", "run.save_every=1"]
    assert run_train(tiny_recipe, tmp_path / "run", *overrides) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    command = [f"recipe={tiny_recipe}", f"run.dir={tmp_path / 'run'}", *SHORT, *overrides]
    capsys.readouterr()
    assert run_command(doctor.main, command) == 0
    assert "/checkpoints/step-1\n" in capsys.readouterr().out
    assert run_command(doctor.main, [*command, "stages.instruct.batch.size=2"]) == 5
    assert "FAIL run model: [K210]" in capsys.readouterr().out.replace("  ", " ")
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_loss_that_rises_at_every_rate_is_a_failure() -> None:
    assert "at the full learning rate" in require_falling(Flow({}, 2.0, 1.5, 1.0))
    assert "at a tenth of the learning rate" in require_falling(Flow({}, 2.0, 1.5, 0.1))
    with pytest.raises(NumericError, match="N302"):
        require_falling(Flow({}, 2.0, 2.5, 0.1))


def test_logits_of_another_model_are_not_taken_for_rounding() -> None:
    logits = torch.randn(4, 9)
    assert round_trip.compare_logits(logits, logits.clone(), Path("x")).endswith("bit for bit")
    assert "rounding" in round_trip.compare_logits(logits, logits + 1e-6, Path("x"))
    for other in (logits + 0.1, logits * torch.nan):
        with pytest.raises(CheckpointError, match="K208"):
            round_trip.compare_logits(logits, other, Path("x"))
