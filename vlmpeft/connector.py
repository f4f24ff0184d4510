"""The projector of a recipe, and how its tokens lie on the image."""

from __future__ import annotations

from typing import cast

from torch import nn

from vlmpeft.encoder import Encoder
from vlmpeft.errors import ModelError
from vlmpeft.projectors import PROJECTORS
from vlmpeft.projectors.base import Grid, Projector, add_newline, fit_grid, output_grid
from vlmpeft.recipe import Recipe


def fresh_projector(recipe: Recipe, vision: Encoder, language_width: int) -> nn.Module:
    """A fresh projector that knows the encoder's grid, with a newline where the recipe merges tiles by rows.

    Raises: ModelError naming encoder and grid if the projector cannot take it: now, not at step 1.
    """
    built = PROJECTORS.build(recipe.projector.name, vision.width, language_width, **recipe.projector.options)
    try:
        fit_grid(built, vision.grid, vision.num_tokens)
    except ModelError as error:
        grid = "x".join(map(str, vision.grid))
        message = f"vision '{recipe.vision.name}' gives a grid of {grid} tokens: {error.message}"
        raise ModelError(error.code, message, error.fix) from error
    projector = cast(nn.Module, built)
    if recipe.data.tile_merge == "spatial_unpad":
        add_newline(projector, language_width)
    return projector


def view_grid(recipe: Recipe, vision: Encoder, projector: nn.Module) -> Grid | None:
    """The grid by which the model merges tiles; None if the recipe does not.

    Raises: ModelError M513 if the tokens of a view lie on none.
    """
    if recipe.data.tile_merge == "flat":
        return None
    grid = output_grid(cast(Projector, projector), vision.grid, vision.num_tokens)
    if grid is None:
        found = f"projector '{recipe.projector.name}' gives tokens of '{recipe.vision.name}' that lie on no known grid"
        fix = "set data.tile_merge=flat, or use mlp2x_gelu, pixel_shuffle or ldpv2 on an encoder of whole grids."
        raise ModelError("M513", f"{found}, by whose rows data.tile_merge=spatial_unpad joins tiles.", fix)
    return grid
