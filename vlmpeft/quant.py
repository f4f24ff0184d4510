"""Frozen weights in few bits by bitsandbytes: 4 (QLoRA, arXiv:2305.14314) or 8 (LLM.int8, arXiv:2208.07339).

Linear layers of the language model's blocks alone: embeddings, head, projector and vision tower stay as they are, and
norms are brought to fp32, as QLoRA does.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.parts import Parts, parts_of
from vlmpeft.quant_anew import ORIGINAL
from vlmpeft.quant_weight import is_quantised
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.sites import is_norm
from vlmpeft.tuners.targets import ALL_LINEAR, find_linears, replace_module

OLDEST = (0, 50)  # the first bitsandbytes with all that is used here on a CPU too
OUTLIER = 6.0  # input columns with a larger value are multiplied in full; LLM.int8, section 3.2
COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class QuantConfig:
    """How the language model's linear layers lie in memory; see `quantise`.

    bits: 4, 8, or null for the run's precision. For 4 bits: type: the 16 values. block: weights that share a scale.
    double: quantise the scales too. compute: precision of the products.
    """

    bits: Literal[4, 8] | None = None
    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    compute: Literal["bf16", "fp32"] = "bf16"
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64

    def line(self, device: str) -> str:
        """What a run says of it at its start. Args: device: the type of the device it runs on."""
        scales = "scales of 8 bits" if self.double else "scales of 32 bits"
        four = f"{self.type}, blocks of {self.block}, {scales}, products in {self.compute}"
        kind = four if self.bits == 4 else f"8 bits (LLM.int8, outliers above {OUTLIER:g} in full)"
        slow = "; on a CPU it saves memory, not time: every product dequantises" if device == "cpu" else ""
        return f"quant: {kind}{slow}"


def bitsandbytes_for(key: str, instead: str) -> Any:
    """The bitsandbytes package. Args: key: what asks for it; instead: how to do without it.

    Raises: EnvironmentFault E410 if it is missing, broken or too old.
    """
    fix = f"pip install 'bitsandbytes>={OLDEST[0]}.{OLDEST[1]}', or {instead}."
    try:
        import bitsandbytes
    except Exception as error:  # its native library fails in ways of its own
        reason = "is not installed" if isinstance(error, ImportError) else f"does not load: {error}"
        raise EnvironmentFault("E410", f"{key} needs bitsandbytes, which {reason}.", fix) from error
    version = str(bitsandbytes.__version__)
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        raise EnvironmentFault("E410", f"{key} needs bitsandbytes, but {version} is too old.", fix)
    return bitsandbytes


def check_quant(config: QuantConfig) -> Any:
    """bitsandbytes, if anything is to be quantised; nothing falls back by itself. Raises: EnvironmentFault E410."""
    if config.bits is None:
        return None
    return bitsandbytes_for(f"quant.bits={config.bits}", "train LoRA on the full weights with quant=null")


def quantise(
    model: nn.Module, config: QuantConfig, parts: Parts | None = None, device: Any = None, keep_originals: bool = False
) -> None:
    """Put the linear layers of the language model's blocks into few bits, in place, one at a time; freeze them.

    Args:
        model: any model with `Parts`, not tuned yet: load, then quantise, then tune.
        device: where the quantised layers go; None leaves each where it is.
        keep_originals: whether a layer remembers the weight it had until an adapter that needs it is there (LoftQ).

    Raises: EnvironmentFault E410; ModelError M558 for a model with adapters, or quantised before.
    """
    bitsandbytes = check_quant(config)
    if bitsandbytes is None:
        return
    parts = parts or parts_of(model)
    if any(isinstance(m, Attachment) or is_quantised(m) for m in parts.language.modules()):
        message = "the language model carries adapters or is quantised already."
        raise ModelError("M558", message, "quantise a freshly loaded model, then tune it.")
    into = _in_4_bits if config.bits == 4 else _in_8_bits
    linears: dict[str, Any] = dict(find_linears(model, parts, "language", ALL_LINEAR))
    for path in list(linears):
        linear = linears.pop(path)  # so that its weight is freed before the next is packed
        layer = into(bitsandbytes.nn, linear, config, device or linear.weight.device)
        if keep_originals:
            setattr(layer, ORIGINAL, linear.weight.detach())
        replace_module(model, path, layer)
    for module in parts.language.modules():
        if is_norm(module) and any(p.dtype != torch.float32 for p in module.parameters()):
            _compute_in_fp32(module)


def _in_4_bits(library: Any, linear: Any, config: QuantConfig, device: Any) -> nn.Module:
    """bitsandbytes' layer in the place of a linear one, with its bias.

    On a CPU with AVX512-bf16 its first forward without gradients would repack the weight: scales rounded to bf16,
    double quantisation undone, and no way back. `support_avx512bf16_for_cpu` is what it asks before it does.
    """
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = library.Linear4bit(*sizes, COMPUTE[config.compute], config.double, config.type, device="meta")
    options = {"blocksize": config.block, "compress_statistics": config.double, "quant_type": config.type}
    layer.weight = library.Params4bit(linear.weight.data, requires_grad=False, module=layer, **options).to(device)
    layer.support_avx512bf16_for_cpu = False
    return _finished(layer, linear, device)


def _in_8_bits(library: Any, linear: Any, _config: QuantConfig, device: Any) -> nn.Module:
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # or a line at every forward
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = library.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=OUTLIER, device="meta")
    weight = linear.weight.data.cpu()  # on its way from the CPU alone is it quantised
    layer.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    return _finished(layer, linear, device)


def _finished(layer: Any, linear: Any, device: Any) -> nn.Module:
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    module: nn.Module = layer.train(linear.training)
    return module


def _compute_in_fp32(norm: nn.Module) -> None:
    """Weights and arithmetic in fp32; what comes out has the dtype it had before, which the layers after it expect."""
    dtype = next(norm.parameters()).dtype
    norm.float()
    norm.register_forward_pre_hook(_widen)
    norm.register_forward_hook(partial(_narrow, dtype))


def _widen(_norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].float(), *inputs[1:])


def _narrow(dtype: torch.dtype, _norm: nn.Module, _inputs: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.to(dtype)
