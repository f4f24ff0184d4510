"""The model we assemble: encoder -> projector -> splice -> causal LM.

Letters: b batch, s sequence, i views of images, n tokens of one, k after the projector, t tokens of all images,
d width, m supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmpeft.anyres import Grid, Tiling, merged_tokens
from vlmpeft.batch import IMAGE_TOKEN_ID, Batch, supervised_index
from vlmpeft.errors import ModelError
from vlmpeft.language import decoder_of, hidden_states, logits_of
from vlmpeft.loss import answer_loss
from vlmpeft.parts import Parts
from vlmpeft.projectors.base import NEWLINE
from vlmpeft.routed import routed
from vlmpeft.routing import Routing, position_ids, routing_of, turn_mask
from vlmpeft.tile_merge import merged


class VLMOutput(NamedTuple):
    """What a forward gives; the loss comes first, where `transformers.Trainer` looks for it.

    Args:
        loss: sum of the cross entropy over supervised tokens, divided by `num_items_in_batch` or else their number.
        logits: (b, s, vocabulary) without labels; with labels only at supervised positions, (m, vocabulary).
    """

    loss: Tensor | None
    logits: Tensor


class VLM(nn.Module):
    """A frozen encoder, a projector and a causal LM, composed through `inputs_embeds`.

    Args:
        vision: (i, 3, h, w) -> (i, n, d).
        projector: (i, n, d) -> (i, k, width of the LM).
        language: any causal LM of transformers.
        image_scale: factor on the projector's output, and on its newline.
        view_grid: rows and columns of the k tokens of a view, where tiles merge by spatial_unpad; the projector then
            has a newline (`add_newline`). None leaves views one after another.
    """

    def __init__(
        self,
        vision: nn.Module,
        projector: nn.Module,
        language: Any,
        image_scale: float = 1.0,
        view_grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.vision, self.projector, self.language = vision, projector, language
        self.image_scale, self.view_grid = image_scale, view_grid
        self.config = language.config  # transformers.Trainer and accelerate read it

    @property
    def parts(self) -> Parts:
        """The anatomy of this model."""
        head: nn.Module = self.language.get_output_embeddings()
        blocks = next(m for m in decoder_of(self.language).children() if isinstance(m, nn.ModuleList))
        return Parts(self.vision, self.projector, self.language, head, list(blocks), IMAGE_TOKEN_ID)

    def image_embeddings(self, pixel_values: Tensor) -> Tensor:
        """(i, 3, h, w), or features (i, n, d) computed before -> (i, k, width) in the LM's dtype."""
        features = self.vision(pixel_values) if pixel_values.ndim == 4 else pixel_values
        parameter = next(self.projector.parameters(), features)
        dtype = self.language.get_input_embeddings().weight.dtype
        embeddings: Tensor = self.projector(features.to(parameter.dtype))
        return (embeddings * self.image_scale).to(dtype)

    def embed(
        self,
        input_ids: Tensor,
        mask: Tensor,
        labels: Tensor | None,
        pixel_values: Tensor | None,
        tilings: Sequence[Tiling] | None = None,
    ) -> tuple[Routing, Tensor]:
        """What the language model needs of a `Batch`: where everything is, and embeddings (b, s, width).

        Raises: ModelError M515 as `splice` and `tile_merge.merged`.
        """
        images, counts = (None, ()) if pixel_values is None else self._image_tokens(pixel_values, tilings)
        routing = routing_of(input_ids, mask, labels, IMAGE_TOKEN_ID, counts)
        return routing, self.splice(input_ids, routing.visual, images)

    def _image_tokens(self, pixel_values: Tensor, tilings: Sequence[Tiling] | None) -> tuple[Tensor, tuple[int, ...]]:
        """The tokens of all images (t, width), and how many each has, or each view where views stay apart."""
        views = self.image_embeddings(pixel_values)
        if self.view_grid is None:
            return views.flatten(0, 1), (views.shape[1],) * len(views)
        newline = self.projector.get_parameter(NEWLINE) * self.image_scale
        tokens = merged(views, tilings, self.view_grid, newline)
        return tokens, tuple(merged_tokens(tiling, self.view_grid) for tiling in tilings or ())

    def embed_batch(self, batch: Batch) -> tuple[Routing, Tensor]:
        """`embed` of a batch's fields."""
        return self.embed(batch.input_ids, batch.attention_mask, batch.labels, batch.pixel_values, batch.tilings)

    def splice(self, input_ids: Tensor, visual: Tensor, images: Tensor | None) -> Tensor:
        """Token embeddings with image embeddings in the place of the placeholders.

        Args: input_ids (b, s); visual (b, s) bool, image placeholders; images (t, width), or None.
        Returns: (b, s, width).
        Raises: ModelError M515 if placeholders and image tokens differ in number (checked where it costs no wait).
        """
        ids = input_ids.masked_fill(input_ids == IMAGE_TOKEN_ID, 0)  # even one under the padding is no token's id
        embeddings: Tensor = self.language.get_input_embeddings()(ids)
        if images is None:
            self._check_count(visual, 0)
            return embeddings + self._no_images().to(embeddings.dtype)
        self._check_count(visual, len(images))
        return embeddings.masked_scatter(visual[..., None], images)

    def _no_images(self) -> Tensor:
        """A zero that depends on all that trains before the LM, so that a text-only batch has the graph of the others.

        Without it a stage that trains the projector alone has nothing to differentiate there, and processes that wait
        for each other's gradients hang.
        """
        trained = [p for part in (self.vision, self.projector) for p in part.parameters() if p.requires_grad]
        device = self.language.get_input_embeddings().weight.device
        return sum((p.flatten()[:1].sum() * 0 for p in trained), start=torch.zeros((), device=device))

    @staticmethod
    def _check_count(visual: Tensor, tokens: int) -> None:
        if visual.device.type == "cpu" and (placeholders := int(visual.sum())) != tokens:
            raise ModelError(
                "M515",
                f"{placeholders} image placeholders in input_ids, but the images give {tokens} tokens.",
                "expand each image to projector.num_tokens(n) placeholders, as vlmpeft's collator does.",
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        turns: Tensor | None = None,
        supervised: Tensor | None = None,
        tilings: Sequence[Tiling] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> VLMOutput:
        """Forward of a `Batch`; the arguments are its fields.

        Args: num_items_in_batch: divisor of the summed loss; None divides by the supervised tokens of this batch.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        routing, embeddings = self.embed(input_ids, mask, labels, pixel_values, tilings)
        bias = mask if turns is None else turn_mask(mask, turns, embeddings.dtype)
        with routed(routing):
            hidden = hidden_states(self.language, embeddings, bias, position_ids(mask, turns))
        if labels is None:
            return VLMOutput(None, logits_of(self.language, hidden))
        index = supervised_index(labels) if supervised is None else supervised
        logits = logits_of(self.language, hidden.flatten(0, 1)[index])  # (m, vocabulary): no logits where no loss
        return VLMOutput(answer_loss(logits, labels, index, num_items_in_batch), logits)
