"""Many adapters at once: a mixed batch is its rows one by one, in outputs, gradients and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from native import make_native, native_bundle, native_directory
from peft import PeftModel
from tiny_models import changed, hf_inputs, hf_llava, our_inputs, our_vlm, randomise, state_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import vlmpeft
from vlmpeft.decode import Request
from vlmpeft.errors import ModelError
from vlmpeft.pool import AdapterPool
from vlmpeft.steering import MoReS
from vlmpeft.tuners import IA3, BitFit, BottleneckAdapter, Full, LoRA, UniPELT

Rows = list[str | None]
TUNERS = {
    "small": LoRA(2), "large": LoRA(5, alpha=5.0), "scaled": IA3(), "seeing": LoRA(3, where="visual"),
    "boxed": BottleneckAdapter(4), "reading": BottleneckAdapter(6, "pfeiffer", where="text"),
}  # fmt: skip
NAMES: list[Rows] = [
    ["small", "large"], ["large", None], ["scaled", "small"], ["seeing", "seeing"], [None, "seeing"],
    ["boxed", "reading"], ["reading", "large"],
]  # fmt: skip


def make(kind: str, language_dir: Path) -> tuple[AdapterPool, dict[str, Tensor]]:
    """A pool of six adapters with random weights, on ours or on Hugging Face's LLaVA, and a batch of two rows."""
    model = our_vlm(language_dir) if kind == "ours" else hf_llava()
    inputs = our_inputs() if kind == "ours" else hf_inputs()
    if kind == "hf":
        inputs = {k: torch.cat([v, v.flip(1) if k != "pixel_values" else -v]) for k, v in inputs.items()}
    pool = AdapterPool(vlmpeft.tune(model, [Full("projector")]))
    for seed, (name, tuner) in enumerate(TUNERS.items()):
        pool.add(name, tuner)
        randomise(pool.parameters(name), seed)
    return pool, {k: v for k, v in inputs.items() if k != "labels"}


def row(inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One row of the batch with its own pictures."""
    alone = {k: v[number : number + 1] for k, v in inputs.items()}
    if not len(alone.get("pixel_values", ())):
        alone.pop("pixel_values")
    return alone


def logits(pool: AdapterPool, inputs: dict[str, Tensor]) -> Tensor:
    out: Tensor = pool.tuned.model(**inputs).logits
    return out


def alone(pool: AdapterPool, inputs: dict[str, Tensor], names: Rows) -> list[Tensor]:
    """Logits of every row by itself, its adapter active."""
    found = []
    for number, name in enumerate(names):
        pool.activate(name)
        found.append(logits(pool, row(inputs, number)))
    pool.activate(None)
    return found


KINDS = pytest.mark.parametrize("kind", ["ours", "hf"])


@KINDS
@pytest.mark.parametrize("names", NAMES, ids=str)
@torch.no_grad()
def test_a_mixed_batch_gives_what_its_rows_give_alone(kind: str, names: Rows, language_dir: Path) -> None:
    pool, inputs = make(kind, language_dir)
    with pool.rows(names):
        mixed = logits(pool, inputs)
    base = logits(pool, inputs)
    for number, (name, expected) in enumerate(zip(names, alone(pool, inputs, names), strict=True)):
        assert (mixed[number] - expected[0]).abs().max() <= 1e-5
        visual = name != "seeing" or bool((inputs["input_ids"][number] == pool.tuned.parts.image_token_id).any())
        acts = name is not None and visual
        assert torch.allclose(mixed[number], base[number], atol=1e-3) is not acts


@torch.no_grad()
def test_an_adapter_of_the_pool_is_the_one_that_tune_makes(language_dir: Path) -> None:
    pool, inputs = make("ours", language_dir)
    pool.activate("large")
    found = logits(pool, inputs)
    model = our_vlm(language_dir)
    tuned = vlmpeft.tune(model, [TUNERS["large"]])
    for (name, ours), theirs in zip(tuned.trainable().items(), pool.parameters("large").values(), strict=True):
        assert name.endswith(("lora_A.weight", "lora_B.weight"))
        ours.copy_(theirs)
    assert torch.equal(found, model(**inputs).logits)


@KINDS
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("names", [["small", "scaled"], ["large", "boxed"]], ids=str)
def test_gradients_of_a_mixed_batch_are_those_of_its_rows(
    kind: str, names: list[str], reentrant: bool | None, language_dir: Path
) -> None:
    pool, inputs = make(kind, language_dir)
    trained = pool.train(names)

    def gradients(outputs: list[Tensor]) -> dict[str, Tensor]:
        loss = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
        loss.backward()  # type: ignore[union-attr]
        found = {k: p.grad.clone() for k, p in trained.items() if p.grad is not None}
        pool.tuned.model.zero_grad()
        return found

    expected = gradients(alone(pool, inputs, [*names]))
    pool.tuned.model.train()
    if reentrant is not None:
        language = pool.tuned.model.language if kind == "ours" else pool.tuned.model  # type: ignore[union-attr]
        language.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator,union-attr]
    with pool.rows(names):
        out = logits(pool, inputs)
    found = gradients([out[:1], out[1:]])  # after the block: what is recomputed still knows its rows
    assert found.keys() == expected.keys() == trained.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
        assert gradient.abs().max() > 0


def test_only_the_named_adapters_train(language_dir: Path) -> None:
    pool, inputs = make("ours", language_dir)
    assert not any(p.requires_grad for name in pool.names for p in pool.parameters(name).values())
    trained = pool.train(["large"])
    projector = set(pool.tuned.trainable())
    assert {n for n, p in pool.tuned.model.named_parameters() if p.requires_grad} == trained.keys() | projector
    assert len(trained) == 2 * 7 * 2  # A and B of seven layers in two blocks
    with pool.rows(["large", "small"]):
        logits(pool, inputs).sum().backward()
    assert all(p.grad is not None for p in trained.values())


@KINDS
@torch.no_grad()
def test_delete_leaves_the_others_and_at_last_the_base_bit_for_bit(kind: str, language_dir: Path) -> None:
    bare = our_vlm(language_dir) if kind == "ours" else hf_llava()
    before = state_of(bare)
    pool, inputs = make(kind, language_dir)
    with pool.rows(["small", "scaled"]):
        expected = logits(pool, inputs)
    for name in ("large", "seeing", "boxed"):
        pool.delete(name)
    with pool.rows(["small", "scaled"]):
        assert torch.equal(logits(pool, inputs), expected)
    for name in pool.names:
        pool.delete(name)
    assert not changed(before, pool.tuned.model)
    assert "forward" not in vars(pool.tuned.parts.blocks[0])
    assert torch.equal(logits(pool, inputs), bare(**inputs).logits)


@torch.no_grad()
def test_one_is_active_at_a_time_and_a_disabled_one_cannot_be_named(language_dir: Path) -> None:
    pool, inputs = make("ours", language_dir)
    base = logits(pool, inputs)
    assert pool.active is None
    pool.activate("small")
    pool.activate("large")
    assert pool.active == "large"
    large = logits(pool, inputs)
    assert not torch.equal(large, base)
    with pool.tuned.disable():
        assert torch.equal(logits(pool, inputs), base)
    pool.disable("large")
    assert torch.equal(logits(pool, inputs), base)
    for use in (lambda: pool.activate("large"), lambda: pool.rows(["large", None]).__enter__()):
        with pytest.raises(ModelError, match=r"M590.*'large' is disabled"):
            use()
    pool.enable("large")
    pool.activate("large")
    assert torch.equal(logits(pool, inputs), large)


@torch.no_grad()
def test_a_saved_adapter_is_pefts_and_comes_back_under_any_name(language_dir: Path, tmp_path: Path) -> None:
    pool, _ = make("ours", language_dir)
    ids = {"input_ids": torch.tensor([[7, 8, 9, 10]])}
    for name in ("large", "seeing", "scaled", "boxed"):
        pool.save(name, tmp_path / name)
    pool.activate("large")
    theirs: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(language_dir), tmp_path / "large" / "adapters" / "large"
    )
    assert (theirs(**ids).logits - logits(pool, ids)).abs().max() <= 1e-5
    expected = {
        name: [p.clone() for p in pool.parameters(name).values()] for name in ("large", "seeing", "scaled", "boxed")
    }
    pool.add("again", tmp_path / "large")
    for name in ("seeing", "scaled", "boxed"):
        pool.delete(name)
        pool.add(name, TUNERS[name])
        pool.load(name, tmp_path / name)
    for name, other in (("large", "again"), *((n, n) for n in ("seeing", "scaled", "boxed"))):
        for old, new in zip(expected[name], pool.parameters(other).values(), strict=True):
            assert torch.equal(old, new)


@torch.no_grad()
def test_a_model_directory_gives_its_adapter(tmp_path: Path) -> None:
    directory = native_directory(tmp_path)
    bundle = native_bundle(tmp_path / "recipe.yaml", "stages.instruct.lora=null")
    pool = AdapterPool(bundle.tuned)
    pool.add("trained", directory)
    pool.activate("trained")
    loaded = vlmpeft.load(directory, device="cpu")
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(bundle.model(ids).logits, loaded.model(ids).logits)
    with pytest.raises(ModelError, match=r"M552.*already carries"):
        AdapterPool(loaded.tuned).add("other", directory)


def test_generation_mixes_adapters_row_by_row(tmp_path: Path) -> None:
    bundle = native_bundle(make_native(tmp_path), "stages.instruct.lora=null")
    pool = AdapterPool(bundle.tuned)
    for seed, (name, tuner) in enumerate(TUNERS.items()):
        pool.add(name, tuner)
        randomise(pool.parameters(name), seed)
    picture = bundle.blank_image(_picture(tmp_path))
    asked = [("small", None), ("large", picture), (None, picture), ("boxed", picture), ("large", picture)]
    requests = [
        Request(() if image is None else (image,), f"What is shown{'?' * (number + 1)}")
        for number, (_, image) in enumerate(asked)
    ]
    ask: dict[str, Any] = {"max_new_tokens": 6, "contrast": ("Yes", "No")}
    with pool.rows([name for name, _ in asked]):
        mixed = bundle.answer(requests, batch_size=4, **ask)
    for (name, _), request, found in zip(asked, requests, mixed, strict=True):
        pool.activate(name)
        expected = bundle.answer([request], **ask)[0]
        assert found.text == expected.text
        assert found.margin == pytest.approx(expected.margin, abs=1e-4)
    assert len({answer.margin for answer in mixed}) == len(mixed)
    with pool.rows(["small"]), pytest.raises(ModelError, match=r"M592.*adapters for 1 rows, but 5 requests"):
        bundle.answer(requests, **ask)


def _picture(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "red.png")
    return folder / "red.png"


@torch.no_grad()
def test_transformers_generate_takes_rows_as_well(language_dir: Path) -> None:
    pool, inputs = make("hf", language_dir)
    ask: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    model: Any = pool.tuned.model
    with pool.rows(["small", "large"]):
        mixed = model.generate(**inputs, **ask)
    for number, name in enumerate(("small", "large")):
        pool.activate(name)
        assert torch.equal(mixed[number], model.generate(**row(inputs, number), **ask)[0])


def test_what_cannot_be_chosen_by_rows_is_refused_and_leaves_nothing(language_dir: Path) -> None:
    pool, inputs = make("ours", language_dir)
    before, names = state_of(pool.tuned.model), pool.names
    for tuner in (Full("language"), LoRA(2, part="vision"), MoReS(), BitFit(), UniPELT(2, tokens=2)):
        with pytest.raises(ModelError, match="M591"):
            pool.add("new", tuner)
    with pytest.raises(ModelError, match="M550"):
        pool.add("new", LoRA(2, targets=("q_prj",)))
    with pytest.raises(ModelError, match=r"M590.*an adapter 'small'"):
        pool.add("small", LoRA(2))
    with pytest.raises(ModelError, match=r"M590.*did you mean 'small'"):
        pool.activate("smal")
    with pytest.raises(ModelError, match=r"M581.*no directory"):
        pool.add("new", "nowhere")
    assert pool.names == names
    assert not changed(before, pool.tuned.model)
    with pool.rows(["small"]), pytest.raises(ModelError, match=r"M592.*1 rows, but a layer got 2"):
        logits(pool, inputs)
    with pytest.raises(ModelError, match=r"M556.*cannot be merged"):
        pool.tuned.merge()


def test_a_folder_that_does_not_fit_leaves_nothing(language_dir: Path, tmp_path: Path) -> None:
    pool, _ = make("ours", language_dir)
    pool.save("large", tmp_path)
    folder = tmp_path / "adapters" / "large"
    (folder / "adapter_model.safetensors").write_bytes(b"")
    before = state_of(pool.tuned.model)
    with pytest.raises(ModelError, match="M502"):
        pool.add("again", tmp_path)
    assert "again" not in pool.names
    assert not changed(before, pool.tuned.model)
