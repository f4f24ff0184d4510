"""Tuning methods, one a file."""

from vlmpeft.tuners.base import TUNERS, Tuner
from vlmpeft.tuners.full import Full
from vlmpeft.tuners.lora import LoRA
from vlmpeft.tuners.tokens import TokenRows

__all__ = ["TUNERS", "Full", "LoRA", "TokenRows", "Tuner"]
