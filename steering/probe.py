"""LMAR, the layer-wise modality attention ratio (arXiv:2412.12359 eq. 2), and maps of attention over an image.

Letters: b batch, h heads, l layers, n samples, i image tokens of a sample.

For a query, alpha_X is the attention that falls on the visible tokens of X, per token of X; averaged over the heads and
the queries of a sample, the ratio alpha_image / alpha_text is the sample's, and LMAR the mean of it over samples.
Uniform attention gives exactly 1. A query that sees no image or none of the text does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpeft.errors import ConfigError, ModelError, nearest
from vlmpeft.parts import Parts, parts_of
from vlmpeft.routing import Routing
from vlmpeft.steering.attention import Asked, Attended, Call, Queries, Reader, TextScope, asked_of, attended, keys_of
from vlmpeft.steering.statistics import RESAMPLES, Summary, summarise


@dataclass(frozen=True)
class _Forward:
    """What was read in one forward. shown: (b,) samples with an image and queries. compared: those with text, too."""

    asked: Asked
    shown: Tensor
    compared: Tensor
    layers: dict[int, Attended] = field(default_factory=dict)


class LMARProbe:
    """Reads LMAR in every forward inside its `with` blocks; see `lmar`."""

    def __init__(self, model: nn.Module, parts: Parts, text_scope: TextScope, queries: Queries, drop_sink: int) -> None:
        self.parts = parts
        self._options: tuple[TextScope, Queries, int] = (text_scope, queries, drop_sink)
        self._reader = Reader(model, parts, self._see)
        self._forwards: list[_Forward] = []

    def __enter__(self) -> LMARProbe:
        self._reader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def _see(self, layer: int, routing: Routing, call: Call) -> None:
        if self not in routing.memo:
            asked = asked_of(routing, *self._options)
            shown = asked.image.any(1) & asked.real.any(1)
            routing.memo[self] = _Forward(asked, shown, shown & asked.text.any(1))
            self._forwards.append(routing.memo[self])
        forward: _Forward = routing.memo[self]
        forward.layers[layer] = attended(call, forward.asked)

    def _stacked(self, pick: Callable[[Attended], Tensor], chosen: Callable[[_Forward], Tensor]) -> Tensor:
        """(n, l, h) of the chosen samples; layers of fewer heads end in NaN. Raises: ModelError M561 as `ratio`."""
        layers = range(len(self.parts.blocks))
        read = min((len(forward.layers) for forward in self._forwards), default=0)
        if read < len(layers):
            message = f"attention of {read} of {len(layers)} blocks was read."
            raise ModelError("M561", message, "run the model inside the `with` block, with attention=sdpa.")
        found = [[pick(forward.layers[layer]) for layer in layers] for forward in self._forwards]
        most = max(x.shape[1] for x in found[0])
        padded = [torch.stack([F.pad(x, (0, most - x.shape[1]), value=torch.nan) for x in row], 1) for row in found]
        return torch.cat([x[chosen(f)].cpu() for x, f in zip(padded, self._forwards, strict=True)])

    @property
    def skipped(self) -> int:
        """Samples without an image, without text to compare it with, or without a query."""
        return sum(int((~forward.compared).sum()) for forward in self._forwards)

    def per_head(self) -> Tensor:
        """(n, l, h) ratio of every head by itself."""
        return self._stacked(_image, _compared) / self._stacked(_text, _compared)

    def per_sample(self) -> Tensor:
        """(n, l) ratio of every sample, in fp32: heads and queries averaged before the ratio.

        NaN in a layer where no query sees both image and text, as in a window that has left the image behind.
        """
        return self._stacked(_image, _compared).nanmean(-1) / self._stacked(_text, _compared).nanmean(-1)

    def ratio(self) -> Tensor:
        """(l,) LMAR: the mean over samples of their ratios.

        Raises: ModelError M561 if a block's attention was not read: no forward, or an attention that is not PyTorch's;
            M566 if no sample had both an image and text to compare it with.
        """
        found = self.per_sample()
        if not len(found):
            message = f"none of {self.skipped} samples shows an image beside text of scope {self._options[0]}."
            raise ModelError("M566", message, "give samples with an image and a question, or text_scope='all'.")
        return found.nanmean(0)

    def summary(self, seed: int = 0, resamples: int = RESAMPLES) -> Summary:
        """Mean, median and 95 % interval of the ratio over samples; see `statistics.summarise`."""
        return summarise(self.per_sample(), seed, resamples)

    def mass_per_sample(self) -> Tensor:
        """(n, l) share of the attention that falls on the image; of samples without text to compare with, too."""
        return self._stacked(_mass, _shown).nanmean(-1)

    def mass(self) -> Tensor:
        """(l,) the mean of it over samples."""
        return self.mass_per_sample().mean(0)


def _image(a: Attended) -> Tensor:
    return a.image


def _text(a: Attended) -> Tensor:
    return a.text


def _mass(a: Attended) -> Tensor:
    return a.mass


def _shown(forward: _Forward) -> Tensor:
    return forward.shown


def _compared(forward: _Forward) -> Tensor:
    return forward.compared


def lmar(
    model: nn.Module, parts: Parts | None = None, *, text_scope: TextScope = "instruction",
    queries: Queries = "output", drop_sink: int = 0,
) -> LMARProbe:  # fmt: skip
    """`with lmar(model, parts) as probe: model(...)`, then `probe.ratio()`.

    Args:
        text_scope: the text compared with the image: "instruction" (what the user says, where the forward knows turns,
            else as "prompt"), "prompt" (all of the prompt but the image), "all" (also earlier answer tokens).
        queries: "output", the positions that predict answer tokens (without labels the last one), or "all_text".
        drop_sink: leaves the first tokens of the sequence out of the text, where attention sinks.

    Raises: ConfigError C102 for another scope or other queries.
    """
    for key, value, allowed in (("text_scope", text_scope, TextScope), ("queries", queries, Queries)):
        if value not in get_args(allowed):
            raise ConfigError("C102", f"{key}={value!r}{nearest(value, get_args(allowed))}")
    if drop_sink < 0:
        raise ConfigError("C102", f"drop_sink={drop_sink}: expected an integer from 0.")
    return LMARProbe(model, parts or parts_of(model), text_scope, queries, drop_sink)


@torch.no_grad()
def image_attention(model: nn.Module, parts: Parts, row: int, run: Callable[[], object]) -> Tensor:
    """Attention of one query on every image token.

    Args:
        row: position of the query: the one before the token that is to be explained.
        run: makes one forward of one sample.

    Returns: (l, h, i) in fp32. Raises: ModelError M561 as `LMARProbe.ratio`.
    """
    found: dict[int, Tensor] = {}

    def see(layer: int, routing: Routing, call: Call) -> None:
        weights, _ = call.at(torch.tensor([[routing.prompts + row]], device=call.query.device))
        found[layer] = weights[0, :, 0, keys_of(routing.visual, routing)[0]]

    with Reader(model, parts, see):
        run()
    if len(found) < len(parts.blocks):
        message = f"attention of {len(found)} of {len(parts.blocks)} blocks was read."
        raise ModelError("M561", message, "load the model with attention=sdpa.")
    return torch.stack([found[layer].cpu() for layer in range(len(parts.blocks))])
