"""Perplexity against transformers' own loss, multiple choice by hand, L2-SP against its closed form and autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import make_bundle, make_trainer, metrics, run_train

from vlmpeft import retention
from vlmpeft.build import Bundle
from vlmpeft.config import load_recipe
from vlmpeft.drift import Drift
from vlmpeft.errors import ConfigError, EvalError, VlmpeftError
from vlmpeft.recipe import RetentionConfig
from vlmpeft.retention import BUILTIN, Choice, Retained, read_retention
from vlmpeft.stopping import StopSignal
from vlmpeft.tuners.lora_layers import LoRALinear

TEXTS = ("A red square.", "Is there a blue image? No", "What is shown? A photo of a green square.")
QUESTIONS = (
    Choice("Is there a red square?", ("Yes", "No", "A photo of a blue square"), 1),
    Choice("What is shown?", ("A green square", "Yes"), 0),
    Choice("Name a colour", ("yellow", "red"), 0),
)


@pytest.fixture(scope="module")
def bundle(tiny_recipe: Path) -> Bundle:
    return make_bundle(tiny_recipe)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_equals_transformers_loss_on_the_same_ids(bundle: Bundle, batch_size: int) -> None:
    total, tokens = 0.0, 0
    language: Any = bundle.model.language.eval()
    for text in TEXTS:
        ids = bundle.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(language(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    found = retention.evaluate(bundle, Retained(TEXTS, ()), batch_size)
    assert found == {"perplexity": pytest.approx(math.exp(total / tokens), rel=1e-5), "texts": 3, "tokens": tokens}


def by_hand(bundle: Bundle, question: Choice) -> int:
    """The choice with the highest log-likelihood per character, one forward a choice."""
    prompt = f"Question: {question.question}\nAnswer:"
    scores = []
    for choice in question.choices:
        context = bundle.tokenizer(prompt)["input_ids"]
        ids = torch.tensor([bundle.tokenizer(f"{prompt} {choice}")["input_ids"]])
        assert ids[0, : len(context)].tolist() == context
        with torch.no_grad():
            chances = F.log_softmax(bundle.model.language(input_ids=ids).logits[0], -1)
        own = [float(chances[i - 1, ids[0, i]]) for i in range(len(context), ids.shape[1])]
        scores.append(sum(own) / len(choice))
    return scores.index(max(scores))


def test_multiple_choice_equals_the_count_by_hand(bundle: Bundle) -> None:
    chosen = [by_hand(bundle, question) for question in QUESTIONS]
    found = retention.evaluate(bundle, Retained((), QUESTIONS), 2)
    right = sum(c == q.answer for c, q in zip(chosen, QUESTIONS, strict=True))
    assert found == {"accuracy": right / 3, "questions": 3}
    keyed = tuple(Choice(q.question, q.choices, c) for q, c in zip(QUESTIONS, chosen, strict=True))
    assert retention.evaluate(bundle, Retained((), keyed), 2)["accuracy"] == 1.0
    turned = tuple(Choice(q.question, q.choices[::-1], q.answer) for q in keyed)
    assert retention.evaluate(bundle, Retained((), turned), 2)["accuracy"] < 1.0


def test_a_set_is_read_with_answers_as_index_or_text(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    rows = [{"text": "Water is wet."}, {"question": "q", "choices": ["a", "b"], "answer": 1}]
    rows.append({"question": "q", "choices": ["a", "b"], "answer": "a"})
    file.write_text("\n".join(map(json.dumps, rows)))
    expected = Retained(("Water is wet.",), (Choice("q", ("a", "b"), 1), Choice("q", ("a", "b"), 0)))
    assert read_retention(RetentionConfig(str(file))) == expected
    assert read_retention(RetentionConfig()) is None


@pytest.mark.parametrize(
    "row",
    [{}, {"text": " "}, {"text": 3}, {"question": "q", "choices": ["a"], "answer": 0},
     {"question": "q", "choices": ["a", "b"], "answer": 2}, {"question": "q", "choices": ["a", "b"], "answer": "c"},
     {"question": "q", "choices": ["a", ""], "answer": 0}, {"question": "q", "choices": ["a", "b"], "answer": True}],
)  # fmt: skip
def test_a_row_that_is_neither_is_named(row: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('{"text": "fine"}\n' + json.dumps(row))
    with pytest.raises(EvalError, match=r"V610.*set.jsonl row 2"):
        read_retention(RetentionConfig(str(file)))


def test_texts_without_a_predicted_token_are_refused(bundle: Bundle) -> None:
    with pytest.raises(VlmpeftError, match="V610"):
        retention.evaluate(bundle, Retained(("A",), ()), 1)


def test_the_set_that_comes_along_is_sound() -> None:
    found = read_retention(RetentionConfig(BUILTIN))
    assert found is not None
    assert (len(found.texts), len(found.questions)) == (30, 32)
    assert all(len(set(q.choices)) == 4 for q in found.questions)
    places = [sum(q.answer == place for q in found.questions) for place in range(4)]
    assert places == [8, 8, 8, 8]  # no place is right more often than another


@pytest.mark.parametrize(
    "override",
    ["stages.instruct.optim.l2_sp=-1", "stages.instruct.optim.l2_sp=.inf", "retention.batch_size=0", "run.timeout_s=0"],
)
def test_keys_out_of_range_are_refused(override: str, tiny_recipe: Path) -> None:
    with pytest.raises(ConfigError, match="C102"):
        load_recipe(str(tiny_recipe), [override])


def test_a_run_measures_before_and_after_and_says_so(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(tiny_recipe, tmp_path / "run", f"retention.data={BUILTIN}", "retention.batch_size=16") == 0
    results = json.loads((tmp_path / "run" / "retention.json").read_text())
    measured = {"perplexity", "texts", "tokens", "accuracy", "questions"}
    assert {moment: set(found) for moment, found in results.items()} == {"before": measured, "after": measured}
    assert results["before"]["perplexity"] != results["after"]["perplexity"]
    out = capsys.readouterr().out
    assert f"retention, perplexity: before {results['before']['perplexity']:.3f}, after " in out
    assert f"retention, multiple choice: before {results['before']['accuracy']:.1%}, after " in out
    assert 'id="retention"' in (tmp_path / "run" / "report.html").read_text()


def test_drift_adds_the_gradient_of_half_alpha_times_the_squared_distance(tiny_recipe: Path) -> None:
    """For fully tuned tensors alpha (w - w0); for LoRA autograd of |scale B A|^2; on top of a gradient."""
    bundle = make_bundle(tiny_recipe)
    drift, generator = Drift(bundle.tuned, 0.3), torch.Generator().manual_seed(5)
    trained = bundle.tuned.trainable()
    starts = {k: p.detach().clone() for k, p in trained.items()}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            parameter.grad = torch.ones_like(parameter)
    layers = [m for m in bundle.model.modules() if isinstance(m, LoRALinear)]
    full = {k: p for k, p in trained.items() if "lora_" not in k}
    penalty = sum(layer.delta().square().sum() for layer in layers)
    penalty = 0.15 * (penalty + sum((p - starts[k]).square().sum() for k, p in full.items()))
    expected = dict(zip(trained, torch.autograd.grad(penalty, list(trained.values())), strict=True))
    assert drift.add_gradient().item() == pytest.approx(penalty.item(), rel=1e-5)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, 1 + expected[name], rtol=1e-5, atol=1e-6)
        if name in full:
            torch.testing.assert_close(expected[name], 0.3 * (parameter.detach() - starts[name]))
    assert len(layers) > 0 < len(full)


def test_drift_starts_at_nothing_for_a_fresh_adapter_and_holds_the_weights_back(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    moved, norms = [], []
    for strength in (0.0, 50.0):
        directory = tmp_path / str(strength)
        more = (f"stages.instruct.optim.l2_sp={strength}", "stages.instruct.tuners.lora.dropout=0")
        trainer = make_trainer(tiny_recipe, "instruct", directory, *more)
        start = {k: p.detach().clone() for k, p in trainer.bundle.tuned.trainable().items()}
        trainer.train(StopSignal())
        layers = [m for m in trainer.bundle.model.modules() if isinstance(m, LoRALinear)]
        norms.append(float(torch.stack([layer.delta().detach().norm() for layer in layers]).norm()))
        full = {k: p for k, p in trainer.bundle.tuned.trainable().items() if "lora_" not in k}
        moved.append(float(torch.stack([(p.detach() - start[k]).norm() for k, p in full.items()]).norm()))
    rows = metrics(tmp_path / "50.0")
    assert float.fromhex(rows[0]["drift"]) == 0.0
    assert float.fromhex(rows[-1]["drift"]) > 0
    assert "drift" not in metrics(tmp_path / "0.0")[0]
    assert norms[1] < norms[0]
    assert moved[1] < moved[0]
