"""What a projector is, and the registry of their names.

Letters: i images, n vision tokens of one image.
A projector of your own is one class and no edit here; a recipe finds it with `imports=[my_module]`:

    @PROJECTORS.register("mine")
    class Mine(nn.Module):
        def __init__(self, in_dim: int, out_dim: int, *, dropout: float = 0.0) -> None: ...
        def forward(self, features): ...  # (i, n, in_dim) -> (i, num_tokens(n), out_dim)
        def num_tokens(self, n: int) -> int: ...

One that works on neighbouring patches adds `input_grid = None` to the class; see `GridProjector`. One that changes
their number and keeps them on a grid says so by `output_grid`; see `LaidOut`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from vlmpeft.errors import ConfigError, ModelError, nearest
from vlmpeft.registry import Registry


@runtime_checkable
class Projector(Protocol):
    """An nn.Module from vision features to language-model embeddings.

    It is built as `P(in_dim, out_dim, **options)`: positional arguments come from the model, keyword-only ones
    from the recipe, and the signature is the schema.
    """

    def __call__(self, features: Tensor, /) -> Tensor:
        """Project features: (i, n, in_dim) -> (i, num_tokens(n), out_dim)."""
        ...

    def num_tokens(self, n: int, /) -> int:
        """Output tokens for n input tokens; known without a forward, so that the collator can expand placeholders."""
        ...


Grid = tuple[int, int]  # rows and columns of vision tokens, which come row by row


@runtime_checkable
class GridProjector(Projector, Protocol):
    """A projector that works on neighbouring patches.

    input_grid: the encoder's grid, which `vlmpeft.build` and `vlmpeft.load` set before anything is asked of the
    projector. It is None at first; a projector then takes the tokens for a square.
    """

    input_grid: Grid | None


@runtime_checkable
class LaidOut(Projector, Protocol):
    """A projector whose output tokens lie on the image, row by row."""

    def output_grid(self, n: int, /) -> Grid:
        """Rows and columns of the tokens that n input tokens give; their product is num_tokens(n)."""
        ...


Factory = Callable[..., Projector]
Family = Callable[[int], Factory]
AnyFactory = TypeVar("AnyFactory", bound=Factory)
AnyFamily = TypeVar("AnyFamily", bound=Family)


class ProjectorRegistry(Registry[Projector]):
    """A registry that also knows families of names with a number in them, such as mlpNx_gelu."""

    def __init__(self) -> None:
        super().__init__("projector")
        self._families: dict[str, tuple[re.Pattern[str], Family]] = {}

    def register_family(self, pattern: str, *, example: str) -> Callable[[AnyFamily], AnyFamily]:
        """Decorator that adds a function from the number in a name to a factory.

        Args:
            pattern: regular expression for whole names, with one group: the number.
            example: a name of the family, shown in lists and suggestions.
        """

        def add(family: AnyFamily) -> AnyFamily:
            self._families[example] = (re.compile(pattern), family)
            return family

        return add

    def register(self, name: str) -> Callable[[AnyFactory], AnyFactory]:
        """Decorator that adds a factory under `name`. Raises: ConfigError C120 if the name is taken by another."""
        if self._from_family(name) is not None:
            raise ConfigError("C120", f"{self.kind} '{name}' is already registered.", "choose another name.")
        register = super().register(name)

        def add(factory: AnyFactory) -> AnyFactory:
            register(factory)
            return factory

        return add

    def get(self, name: str) -> Factory:
        """The factory called `name`. Raises: ConfigError C103 with the nearest name."""
        factory = self._factories.get(name) or self._from_family(name)
        if factory is None:
            raise ConfigError("C103", f"no {self.kind} '{name}'{nearest(name, self)}")
        return factory

    def build(self, name: str, *args: Any, **options: Any) -> Projector:
        """Call the factory. Raises: ConfigError C104 for an unknown option, ModelError M514 if it lacks num_tokens."""
        projector = super().build(name, *args, **options)
        if not isinstance(projector, Projector):
            raise ModelError(
                "M514",
                f"projector '{name}' ({type(projector).__name__}) has no num_tokens(n).",
                "add the method: output tokens for n input tokens, `return n` if their number does not change.",
            )
        return projector

    def _from_family(self, name: str) -> Factory | None:
        for pattern, family in self._families.values():
            if match := pattern.fullmatch(name):
                return family(int(match[1]))
        return None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._factories or self._from_family(name) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted([*self._factories, *self._families]))


PROJECTORS = ProjectorRegistry()


def fit_grid(projector: Projector, grid: Grid, tokens: int) -> int:
    """Tell a projector that asks for it the grid of the encoder's `tokens`. Returns: tokens of one image after it."""
    if isinstance(projector, GridProjector):
        projector.input_grid = grid
    return projector.num_tokens(tokens)


def output_grid(projector: Projector, grid: Grid, tokens: int) -> Grid | None:
    """Rows and columns that the tokens of a view form after a projector; None if they form none, as queries do.

    Args: grid, tokens: of the encoder. A projector that gives a token for each, whatever their number, keeps the grid.
    """
    if math.prod(grid) != tokens:
        return None
    if isinstance(projector, LaidOut):
        return projector.output_grid(tokens)
    if isinstance(projector, GridProjector) or any(projector.num_tokens(n) != n for n in (tokens, 2 * tokens)):
        return None
    return grid


NEWLINE = "image_newline"  # the name it has in LLaVA-NeXT


def add_newline(projector: nn.Module, width: int) -> None:
    """Give a projector the vector that ends the rows of an image under spatial_unpad: it trains and is saved with it.

    Source: initialisation of LLaVA llava_arch.py and transformers' modeling_llava_next.py: N(0, 1 / width).
    """
    projector.register_parameter(NEWLINE, nn.Parameter(torch.randn(width) / math.sqrt(width)))


def grid_of(n: int, grid: Grid | None, projector: str) -> Grid:
    """Rows and columns that n tokens form: `grid`, or a square if it is None.

    Args: projector: its name, for the message.
    Raises: ModelError M513 if n tokens do not fill the grid or are no square.
    """
    if grid is not None:
        rows, columns = grid
        if n == 0 or rows * columns != n:
            raise ModelError(
                "M513",
                f"projector '{projector}' expects the {rows}x{columns} grid of the encoder "
                f"({rows * columns} vision tokens), got n={n}.",
                "feed exactly the patch tokens (no CLS or register token, no patch dropped), "
                "or choose a projector that needs no grid, such as mlp2x_gelu.",
            )
        return grid
    side = math.isqrt(n)
    if side * side != n or n == 0:
        raise ModelError(
            "M513",
            f"projector '{projector}' was told no grid, and n={n} vision tokens form no square "
            f"(nearest squares: {max(side, 1) ** 2} and {(side + 1) ** 2}).",
            "feed exactly the patch tokens of a square image (no CLS or register token, no patch dropped), set "
            "projector.input_grid=(rows, columns), or choose a projector that needs no grid, such as mlp2x_gelu.",
        )
    return side, side
