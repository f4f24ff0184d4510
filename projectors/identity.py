"""No projector: an encoder whose features are as wide as the language model's embeddings is spliced in as it is."""

from __future__ import annotations

from torch import nn

from vlmpeft.errors import ModelError
from vlmpeft.projectors.base import PROJECTORS


@PROJECTORS.register("identity")
class IdentityProjector(nn.Identity):
    """Features as they are: (i, n, width) -> (i, n, width); no parameters.

    Raises: ModelError M517 if in_dim and out_dim differ.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        if in_dim != out_dim:
            raise ModelError(
                "M517",
                f"projector 'identity' changes no width, but the vision features are {in_dim} wide "
                f"and the language model's embeddings {out_dim}.",
                "choose a projector that changes the width, such as linear or mlp2x_gelu.",
            )

    def num_tokens(self, n: int) -> int:
        """As many as come in."""
        return n
