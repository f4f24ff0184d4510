"""AdaLoRA against peft: layers, penalty, every decision of the allocator, and files both ways."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft_twins import D_IN, share
from runs import make_trainer, metrics
from tiny_models import hf_inputs, hf_llava, logits, our_vlm, randomise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from vlmpeft import Steps, tune
from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.stopping import StopSignal
from vlmpeft.tuners import AdaLoRA
from vlmpeft.tuners.adalora import SVDLinear

R, TOTAL = 4, 20


def peft_config(**options: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_r": R, "target_r": 2, "lora_alpha": 3.0, "total_step": TOTAL, **options})


class Net(nn.Module):
    """Two linear layers with a loss of its own, as peft's model expects one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(D_IN, 16), nn.Linear(16, 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=self.second(torch.tanh(self.first(x))).square().sum())


@pytest.mark.parametrize("delta_t", [1, 3])
def test_penalty_budget_and_choices_are_those_of_peft_at_every_step(delta_t: int) -> None:
    tuner = AdaLoRA(2, R, 3.0, tinit=0.15, tfinal=0.25, delta_t=delta_t, orthogonality=0.3)
    first, last = tuner.phases(TOTAL)
    config = peft_config(
        target_modules=["first", "second"], tinit=first, tfinal=TOTAL - last, deltaT=delta_t, orth_reg_weight=0.3
    )
    theirs: Any = get_peft_model(Net(), config)  # type: ignore[arg-type]
    net = Net()
    layers = {name: SVDLinear(getattr(net, name), R, tuner.scale, 0.0) for name in ("first", "second")}
    for name, layer in layers.items():
        share(layer, getattr(theirs.base_model.model, name), seed=len(name))
        setattr(net, name, layer)
    ours = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-2)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=2e-2)
    state, left = tuner.start_state(layers), []
    for step in range(TOTAL):
        x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(step))
        loss, expected = net(x).loss, theirs.base_model(x).loss  # the outermost forward leaves the penalty out
        loss.backward()
        torch.testing.assert_close(loss + tuner.add_gradients(layers), expected)
        expected.backward()
        for optimizer in (ours, other):
            optimizer.step()
        told = tuner.after_step(layers, state, step, TOTAL)
        assert told["budget"] == theirs.base_model.rankallocator.budget_schedule(step)[0]
        theirs.base_model.update_and_allocate(step)
        for optimizer in (ours, other):
            optimizer.zero_grad()
        for name, layer in layers.items():
            twin = getattr(theirs.base_model.model, name)
            assert (layer.lora_E == 0).equal(twin.lora_E["default"] == 0)
            torch.testing.assert_close(layer.delta(), twin.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
        left.append(sum(int((layer.lora_E != 0).sum()) for layer in layers.values()))
    assert left[: first + 1] == [2 * R] * (first + 1)
    assert left[last:] == [2 * 2] * (TOTAL - last)
    assert left[last - 1] > 2 * 2 or delta_t == 1


def test_a_folder_of_peft_loads_here_with_the_values_that_are_gone_left_out(language_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(language_dir)
    theirs: Any = get_peft_model(base, peft_config(target_modules="all-linear", init_r=3, target_r=2))
    randomise({n: p for n, p in theirs.named_parameters() if "lora_" in n})
    patterns = {}
    for number, (name, parameter) in enumerate(theirs.base_model.model.named_parameters()):
        if "lora_E" in name:  # as the allocator leaves them: one value gone, another from layer to layer
            patterns[name] = [i != number % 3 for i in range(3)]
            parameter.data[~torch.tensor(patterns[name])] = 0.0
    theirs.peft_config["default"].rank_pattern = patterns
    theirs.save_pretrained(tmp_path)
    model, ids = our_vlm(language_dir), {"input_ids": torch.arange(10, 30).view(2, 10)}
    tune(model, [AdaLoRA(2, 3, 3.0)]).load(tmp_path)
    expected = logits(theirs.eval(), ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(our_vlm(language_dir), ids)).abs().max() > 1e-3
    with pytest.raises(ModelError, match=r"M502.*init_r=3"):
        tune(our_vlm(language_dir), [AdaLoRA(2, 4, 3.0)]).load(tmp_path)


def test_a_run_ends_with_the_budget_and_says_it_on_the_way(tiny_recipe: Path, tmp_path: Path) -> None:
    own = "stages.instruct.tuners.lora={kind: adalora, r: 1, init_r: 2, tinit: 0.2, tfinal: 0.3, lr: 1e-2}"
    trainer = make_trainer(
        tiny_recipe, "instruct", tmp_path, "stages.instruct.tuners.lora=null", own, "stages.instruct.optim.steps=8"
    )
    trainer.train(StopSignal())
    layers = [m for m in trainer.bundle.model.modules() if isinstance(m, SVDLinear)]
    assert sum(int((m.lora_E != 0).sum()) for m in layers) == len(layers)
    rows = [row for row in metrics(tmp_path) if "lora_budget" in row]
    assert float.fromhex(rows[0]["lora_budget"]) == 2 * len(layers)
    assert float.fromhex(rows[-1]["lora_budget"]) == len(layers)
    assert float.fromhex(rows[0]["lora_penalty"]) > 0


def test_under_transformers_trainer_a_callback_keeps_the_budget(tmp_path: Path) -> None:
    model = hf_llava()
    tuned = tune(model, [AdaLoRA(1, 2, targets="minimal", tfinal=0.3)])
    steps = Steps(tuned, total=6)

    class Around(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.before(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.add_gradients()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.after(state.global_step)

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=1, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    data: Any = [{key: value[0] for key, value in hf_inputs().items()}] * 4
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Around()]).train()
    layers = [m for m in model.modules() if isinstance(m, SVDLinear)]
    assert sum(int((m.lora_E != 0).sum()) for m in layers) == len(layers) == 4


def test_two_have_budgets_of_their_own() -> None:
    tuned = tune(hf_llava(), {"a": AdaLoRA(1, 2, targets="minimal"), "b": AdaLoRA(2, 3, part="projector")})
    assert Steps(tuned, 10).after(9) == {"a_budget": 4.0, "b_budget": 4.0}


def test_pieces_of_tensors_are_refused(language_dir: Path) -> None:
    tuned = tune(our_vlm(language_dir), [AdaLoRA()])
    Steps(tuned, 10, processes=2)
    with pytest.raises(EnvironmentFault, match=r"E434.*adalora.*ddp.yaml"):
        Steps(tuned, 10, processes=2, sharded=True)
