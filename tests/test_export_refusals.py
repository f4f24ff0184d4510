"""What no format of others can express, and wrong arguments of the export command: one line each, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from native import make_native, native_bundle, native_directory

from vlmpeft import export
from vlmpeft.errors import ModelError, run_command
from vlmpeft.hf_llava import export_hf


@pytest.mark.parametrize(
    ("changes", "to", "says"),
    [
        (["projector.name=ldpv2"], "hf", "the projector ldpv2 has no form in transformers' LlavaForCond"),
        (["projector.name=mlp3x_gelu"], "hf", "the projector mlp3x_gelu has no form"),
        (["projector.rms=0.05"], "hf", "the projector mlp2x_gelu rms=0.05 has no form"),
        (["projector.rms=0.05"], "llava", "the projector mlp2x_gelu rms=0.05 has no form in LLaVA's"),
        (["projector.name=ldp"], "peft", "the projector ldp has no form"),
        (["vision=timm:test_vit", "vision.weights=random"], "hf", "the encoder timm:test_vit has no form"),
        (["vision.image_size=64"], "hf", "vision.image_size=64 of an encoder for 32 has no form"),
        (["stages.instruct.lora=null"], "peft", "a model without LoRA has no form in a peft adapter"),
        (
            ["stages.instruct.lora.where=text"],
            "peft",
            "tuner 'lora' (lora on language where=text) has no",
        ),
        (["stages.instruct.lora.part=vision"], "peft", "tuner 'lora' (lora on vision) has no form in a peft adapter"),
    ],
)
def test_what_a_format_cannot_express_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: list[str], to: str, says: str
) -> None:
    directory = native_directory(tmp_path, "clip", *changes)
    capfd.readouterr()
    assert run_command(export.main, [f"model={directory}", f"to={to}", f"out={tmp_path / 'out'}"]) == 4
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlmpeft:")]
    assert len(lines) == 1
    assert f"error[M570] {says}" in lines[0]
    assert " Fix: " in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_language_model_with_more_than_a_head_is_refused(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    recipe = make_native(tmp_path)
    bundle = native_bundle(recipe)
    config = bundle.model.language.config
    cohere = CohereConfig(  # multiplies its logits by a scale
        vocab_size=config.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    CohereForCausalLM(cohere).save_pretrained(tmp_path / "llm")
    with pytest.raises(ModelError, match=r"M570.*the language model CohereForCausalLM has no form"):
        export_hf(native_bundle(recipe), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["to=hg"], "error[C102] to=hg: no such format; did you mean 'hf'?"),
        (["to=hf", "base=x"], "error[C102] base=x is for to=peft alone"),
        (["to=hf", "dtype=int8"], "error[C102] dtype=int8: no such dtype"),
        ([], "error[C102] to is not given"),
    ],
)
def test_wrong_arguments_are_refused_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run_command(export.main, [f"model={tmp_path}", f"out={tmp_path / 'out'}", *arguments]) == 2
    assert says in capsys.readouterr().err
