"""Steering of visual tokens and attention diagnostics."""

if __name__ != "vlmpeft.steering":
    raise ImportError(
        "import vlmpeft.steering instead: under the bare name 'steering' everything would be registered twice"
    )

from vlmpeft.steering import positions
from vlmpeft.steering.attention import LMARProbe, lmar
from vlmpeft.steering.mores import MoReS, Steering, parameter_count

__all__ = ["LMARProbe", "MoReS", "Steering", "lmar", "parameter_count", "positions"]
