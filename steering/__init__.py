"""Steering of visual tokens and attention diagnostics."""

if __name__ != "vlmpeft.steering":
    raise ImportError(
        "import vlmpeft.steering instead: under the bare name 'steering' everything would be registered twice"
    )

from vlmpeft.steering import positions
from vlmpeft.steering.mores import MoReS, Steering, parameter_count
from vlmpeft.steering.probe import LMARProbe, lmar
from vlmpeft.steering.reference import load_reference

__all__ = ["LMARProbe", "MoReS", "Steering", "lmar", "load_reference", "parameter_count", "positions"]
