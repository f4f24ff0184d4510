"""Projectors: vision features to language-model embeddings."""

if __name__ != "vlmpeft.projectors":
    raise ImportError(
        "import vlmpeft.projectors instead: under the bare name 'projectors' everything would be registered twice"
    )

from vlmpeft.projectors.base import PROJECTORS, GridProjector, Projector
from vlmpeft.projectors.identity import IdentityProjector
from vlmpeft.projectors.ldp import LDPProjector, LDPv2Projector
from vlmpeft.projectors.linear import LinearProjector
from vlmpeft.projectors.mlp import MLPProjector
from vlmpeft.projectors.pixel_shuffle import PixelShuffleProjector
from vlmpeft.projectors.qformer import QFormerProjector
from vlmpeft.projectors.resampler import ResamplerProjector

__all__ = [
    "PROJECTORS",
    "GridProjector",
    "IdentityProjector",
    "LDPProjector",
    "LDPv2Projector",
    "LinearProjector",
    "MLPProjector",
    "PixelShuffleProjector",
    "Projector",
    "QFormerProjector",
    "ResamplerProjector",
]
