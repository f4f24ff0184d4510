"""Projectors that are wrong in one way each, as a user's own file might be: `imports=[odd_projectors]`."""

from __future__ import annotations

from torch import Tensor, nn

from vlmpeft.projectors import PROJECTORS


class Straight(nn.Module):
    """A linear projector that is right; the others below are wrong where their docstring says."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(in_dim, out_dim), nn.Linear(2, 2, bias=False)

    def num_tokens(self, n: int) -> int:
        return n

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@PROJECTORS.register("detached")
class Detached(Straight):
    """Cut from the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).detach()


@PROJECTORS.register("half_used")
class HalfUsed(Straight):
    """Has a layer that nothing uses."""


@PROJECTORS.register("miscounting")
class Miscounting(Straight):
    """Says that it gives one token more than it does."""

    def num_tokens(self, n: int) -> int:
        return n + 1


@PROJECTORS.register("overflowing")
class Overflowing(Straight):
    """Gives infinities."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float("inf")


@PROJECTORS.register("forgetful")
class Forgetful(Straight):
    """Keeps something it is trained on outside of what is saved."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return self.linear(x) * (1 + self.seen) + self.unused.weight.mean()
