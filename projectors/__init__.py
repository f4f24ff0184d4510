"""Projectors: vision features to language-model embeddings."""

if __name__ != "vlmpeft.projectors":
    raise ImportError(
        "import vlmpeft.projectors instead: under the bare name 'projectors' everything would be registered twice"
    )

from vlmpeft.projectors.base import PROJECTORS, Projector
from vlmpeft.projectors.ldp import LDPProjector, LDPv2Projector
from vlmpeft.projectors.linear import LinearProjector
from vlmpeft.projectors.mlp import MLPProjector

__all__ = ["PROJECTORS", "LDPProjector", "LDPv2Projector", "LinearProjector", "MLPProjector", "Projector"]
