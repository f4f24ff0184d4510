"""MoReS: modality linear representation steering (arXiv:2412.12359), and the baselines a claim about it needs.

Letters: n tokens of one image, p steered tokens of a batch, d width, r rank, l steered layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vlmpeft.parts import Parts, path_of
from vlmpeft.routed import Change, RoutedModel, route
from vlmpeft.routing import Routing
from vlmpeft.steering import positions
from vlmpeft.steering.layers import parse_layers
from vlmpeft.steering.units import Units, orthonormal
from vlmpeft.tuners.attachment import Attachment
from vlmpeft.tuners.base import TUNERS, check

NAME = "steering"  # of the module inside the language model

Variant = Literal["mores", "unconstrained", "random"]
Site = Literal["block_input", "block_output"]
Init = Literal["identity", "reference"]
Tokens = Literal["visual", "text"]


@dataclass(frozen=True)
class IndexOf:
    """The flat positions (b * s) a forward steers, from its routing. Args: choice: see `positions`."""

    choice: positions.Choice
    tokens: Tokens

    def __call__(self, routing: Routing) -> Tensor:
        if self.tokens == "text":
            prompt = routing.text if routing.answer is None else routing.text & ~routing.answer
            return _where(positions.chosen_in_rows(self.choice, prompt))
        if routing.images is None:
            return _where(positions.chosen(self.choice, routing.visual))
        mask = positions.chosen(self.choice, routing.visual, routing.images)
        count = sum(self._count(tokens) * images for tokens, images in Counter(routing.images).items())
        return mask.flatten().nonzero_static(size=count).squeeze(1)

    def _count(self, tokens: int) -> int:
        """Steered tokens of one image of so many, found on the host."""
        return int(positions.chosen(self.choice, torch.ones(1, tokens, dtype=torch.bool)).sum())


def _where(mask: Tensor) -> Tensor:
    """Flat indices of True. On an accelerator this waits for the device, once a forward."""
    return mask.flatten().nonzero().squeeze(1)


@TUNERS.register("mores")
@dataclass(frozen=True)
class MoReS:
    """Steer a few image tokens in the residual stream; everything else stays frozen and untouched.

    Args:
        rank: r.
        positions: of each image: "all", "ratio:P", "first_last:N,M" (published: 4,5), "uniform:N", "random:P,SEED".
        site: "block_input" steers what the blocks read; "block_output" what they write (published): there the last
            block's unit can change no answer and gets a gradient of exactly zero.
        layers: "all", "every:K", "shallow", "middle", "deep" or a list of block numbers.
        init: "identity" starts as the untouched model; "reference" as the published code.
        variant: "mores"; "unconstrained", a free rank-r edit; "random", frozen at the reference init drawn by `seed`.
        tokens: "visual", or "text" for LoReFT (arXiv:2404.03592) on the prompt's text.
        dropout: on the edit alone.
        lr: learning rate of its own.
    """

    kind: ClassVar[str] = "mores"
    decays: ClassVar[bool] = False  # A belongs near U^T, not near zero, and the scale of U means nothing
    rank: int = 1
    positions: str = "ratio:0.01"
    site: Site = "block_input"
    layers: str | tuple[int, ...] = "all"
    init: Init = "identity"
    variant: Variant = "mores"
    tokens: Tokens = "visual"
    bias: bool = True
    dropout: float = 0.0
    seed: int = 0
    part: str = "language"
    lr: float | None = None

    def __post_init__(self) -> None:
        positions.parse(self.positions)
        if isinstance(self.layers, str):
            parse_layers(self.layers, 1)  # the name; numbers wait for a model
        for key, value, allowed in (
            ("site", self.site, Site), ("init", self.init, Init),
            ("variant", self.variant, Variant), ("tokens", self.tokens, Tokens),
        ):  # fmt: skip
            check(value in get_args(allowed), f"mores.{key}", value, "one of " + ", ".join(get_args(allowed)))
        check(self.rank >= 1, "mores.rank", self.rank, "an integer of at least 1")
        check(0 <= self.dropout < 1, "mores.dropout", self.dropout, "a number in [0, 1)")
        check(self.part == "language", "mores.part", self.part, "language, whose blocks are steered")
        check(self.lr is None or 0 < self.lr <= 1, "mores.lr", self.lr, "a number in (0, 1]")

    def apply(self, model: nn.Module, parts: Parts) -> Mapping[str, nn.Parameter]:
        """Put the units before (or behind) the blocks. Returns: rotation, source and bias, by name; none if frozen."""
        blocks, width = parse_layers(self.layers, len(parts.blocks)), width_of(parts)
        check(self.rank <= width, "mores.rank", self.rank, f"at most {width}, the width of this model")
        steering = Steering(self._units(parts, len(blocks)), route(model, parts), blocks, self.site)
        parts.language.add_module(NAME, steering)
        if self.variant == "random":
            return {}
        prefix = ".".join(p for p in (path_of(model, parts.language), NAME) if p)
        return {f"{prefix}.{k}": p for k, p in steering.named_parameters()}

    def count_note(self, parameters: Mapping[str, nn.Parameter]) -> str:
        """See `CountedTwice`: the paper counts U and A alone."""
        biases = sum(p.numel() for name, p in parameters.items() if name.endswith(".bias"))
        return f"{sum(p.numel() for p in parameters.values()) - biases:,} without biases" if biases else ""

    def _units(self, parts: Parts, layers: int) -> Units:
        frozen = self.variant == "random"
        with torch.random.fork_rng(enabled=frozen):
            if frozen:  # never saved: the seed brings the same ones back
                torch.manual_seed(self.seed)
            units = Units(
                layers, width_of(parts), self.rank, IndexOf(positions.parse(self.positions), self.tokens),
                bias=self.bias, identity=self.init == "identity" and not frozen,
                constrained=self.variant != "unconstrained", dropout=self.dropout,
            )  # fmt: skip
        device = next(parts.blocks[0].parameters()).device
        return units.to(device).requires_grad_(not frozen).train(parts.language.training)


class Steering(Attachment):
    """The units of a model, at work before or behind its blocks.

    Args:
        routed: the model, with its blocks ready to be changed.
        blocks: number of the block of each unit.
    """

    def __init__(self, units: Units, routed: RoutedModel, blocks: Sequence[int], site: Site) -> None:
        super().__init__()
        self.units, self._routed = units, routed
        self._changes: list[tuple[list[Change], Change]] = []
        for unit, number in enumerate(blocks):
            wrapper = routed.blocks[number]
            changes = wrapper.before if site == "block_input" else wrapper.after
            changes.append(change := partial(self._steer, unit))
            self._changes.append((changes, change))

    @property
    def unmergeable(self) -> str:
        """See `Attachment.unmergeable`."""
        return "it edits hidden states at some positions, between the blocks"

    def _steer(self, unit: int, hidden: Tensor, routing: Routing) -> Tensor:
        return self.units(hidden, unit, routing) if self.enabled else hidden

    def take_out(self, model: nn.Module, path: str) -> None:
        """See `Attachment.take_out`."""
        for changes, change in self._changes:
            changes.remove(change)
        self._routed.release()
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(l,) Frobenius norm of U (A - U^T), the linear part of each layer's edit: how strongly it steers.

        Of the r x r matrices U^T U and C C^T, C = A - U^T: nothing of width by width is made.
        """
        units = self.units
        up = orthonormal(units.rotation) if units.constrained else units.rotation  # (l, d, r)
        down = units.source - up.mT if units.constrained else units.source  # (l, r, d)
        squares = ((up.mT @ up) * (down @ down.mT)).sum((1, 2))
        return squares.clamp_min(0).sqrt()


def width_of(parts: Parts) -> int:
    """d, which the head reads."""
    return int(parts.lm_head.weight.shape[1])  # type: ignore[index]


def parameter_count(width: int, layers: int, rank: int, bias: bool = True) -> int:
    """What MoReS trains inside the language model: 2 d r l, and r l with the biases. The projector comes on top."""
    return 2 * width * rank * layers + (rank * layers if bias else 0)
