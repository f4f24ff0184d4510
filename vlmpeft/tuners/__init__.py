"""Tuning methods, one a file."""

from vlmpeft.tuners.adalora import AdaLoRA
from vlmpeft.tuners.base import TUNERS, Tuner
from vlmpeft.tuners.bitfit import BitFit
from vlmpeft.tuners.bottleneck import BottleneckAdapter
from vlmpeft.tuners.dora import DoRA
from vlmpeft.tuners.embedding_lora import EmbeddingLoRA
from vlmpeft.tuners.fish import FishMask
from vlmpeft.tuners.full import Full
from vlmpeft.tuners.ia3 import IA3
from vlmpeft.tuners.krona import KronA
from vlmpeft.tuners.layers import LayerTuning
from vlmpeft.tuners.lora import LoRA
from vlmpeft.tuners.norm import NormTuning
from vlmpeft.tuners.oft import OFT
from vlmpeft.tuners.prefix_tuning import PrefixTuning
from vlmpeft.tuners.prompt import PromptTuning
from vlmpeft.tuners.ptuning import PTuningV2
from vlmpeft.tuners.tokens import TokenRows
from vlmpeft.tuners.unfreeze import GradualUnfreezing
from vlmpeft.tuners.unipelt import UniPELT
from vlmpeft.tuners.vera import VeRA

__all__ = [
    "IA3",
    "OFT",
    "TUNERS",
    "AdaLoRA",
    "BitFit",
    "BottleneckAdapter",
    "DoRA",
    "EmbeddingLoRA",
    "FishMask",
    "Full",
    "GradualUnfreezing",
    "KronA",
    "LayerTuning",
    "LoRA",
    "NormTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "TokenRows",
    "Tuner",
    "UniPELT",
    "VeRA",
]
