"""Tuning methods, one a file."""

from vlmpeft.tuners.base import TUNERS, Tuner
from vlmpeft.tuners.full import Full
from vlmpeft.tuners.lora import LoRA

__all__ = ["TUNERS", "Full", "LoRA", "Tuner"]
