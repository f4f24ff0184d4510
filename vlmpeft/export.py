"""Write a model directory in a format of others.

python -m vlmpeft.export model=runs/mine/final to=hf out=mine-hf

to=hf     a directory for transformers' LlavaForConditionalGeneration and AutoProcessor (projector mlp2x_gelu,
          encoder vision=hf: of CLIP or SigLIP); adapters merged, or left out with merge=false
to=peft   the LoRA and the projector as one adapter folder for stock peft, on base= (what to=hf merge=false wrote)
to=vllm   what to=hf writes, for `vllm serve`; with merge=false the LoRA lies in out/adapters/, within what vLLM takes
to=llava  a checkpoint with the tensor names and config.json of LLaVA, or of MobileVLM for ldp and ldpv2
dtype     of the weights: fp32, bf16 or fp16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vlmpeft.errors import ConfigError, nearest, run_command
from vlmpeft.eval.runner import parse_arguments

FORMATS = ("hf", "llava", "peft", "vllm")
DEFAULTS = {"merge": True, "base": "", "dtype": "fp32"}


def main(argv: Sequence[str]) -> None:
    """Convert and say where the result is."""
    arguments = parse_arguments(argv, DEFAULTS, ("model", "to", "out"), __doc__ or "")
    kind, base = arguments["to"], arguments["base"]
    if kind not in FORMATS:
        raise ConfigError("C102", f"to={kind}: no such format{nearest(kind, FORMATS)}")
    if base and kind != "peft":
        raise ConfigError("C102", f"base={base} is for to=peft alone.", "leave it out.")
    from vlmpeft.conversion import free_directory, open_model
    from vlmpeft.hf_llava import export_hf
    from vlmpeft.hf_peft import export_peft
    from vlmpeft.hf_vllm import export_vllm
    from vlmpeft.llava_original import export_llava

    out = free_directory(arguments["out"])
    bundle = open_model(arguments["model"], arguments["dtype"])
    if arguments["merge"] and kind != "peft":
        bundle.tuned.merge_and_unload()
    served = ""
    if kind == "peft":
        export_peft(bundle, out, base)
    elif kind == "vllm":
        served = f"\nserve it: {export_vllm(bundle, out)}"
    else:
        (export_hf if kind == "hf" else export_llava)(bundle, out)
    print(f"{out} ({kind}, {arguments['dtype']}){served}")


if __name__ == "__main__":
    sys.exit(run_command(main))
