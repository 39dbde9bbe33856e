"""Draws of q(F), or fixed points in their place, by which an expectation has no noise.

The points of a sample are its means plus or minus its standard deviations. Their signs z are the
rows of a Hadamard matrix without its constant column (Plackett and Burman 1946): over the points
each z_l has mean 0 and variance 1, and no two are correlated, so that the mean of a function f is

    f(mu) + 1/2 sum_l sigma_l^2 f_ll(mu) + terms of the third order in sigma,

as its expectation is. L components take the next power of two above L points.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.distributions import Normal
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pnmf_pyro.data.checks import check_count
from pnmf_pyro.data.parallel import ALONE, Ranks

# What stands for fixed points where a number of draws is asked for.
FIXED = "fixed"


def two_level_points(L: int) -> Tensor:
    """Return the signs z of L components at P points, shape (P, L), with L < P <= 2 L."""
    signs = torch.ones(1, 1)
    while len(signs) <= L:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs[:, 1 : L + 1]


def standard_normals(like: Tensor, n_draws: int | str, table: object = None) -> Iterator[Tensor]:
    """Iterate over draws of standard normals of the shape (L, n) of `like`, or over the signs.

    The signs, for n_draws='fixed', are the same for all samples, (L, 1). Ranks that share a table
    of counts draw what one process would.
    """
    if n_draws == FIXED:
        yield from two_level_points(len(like)).to(like)[..., None]
    else:
        ranks: Ranks = getattr(table, "ranks", ALONE)
        yield from (ranks.normals(like) for _ in range(int(n_draws)))


class DrawnForAllRanks(Messenger):
    """Let a guide draw normal values of the samples of a rank as one process would draw them."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    def _pyro_sample(self, msg: Message) -> None:
        q = msg["fn"]
        if self.ranks.size > 1 and msg["value"] is None and isinstance(q, Normal):
            msg["value"] = q.loc + q.scale * self.ranks.normals(q.loc)
            msg["done"] = True


def check_draws(name: str, value: int | str, mode: str) -> int | str:
    """Return a number of draws, or 'fixed' where the mode can take points in their place."""
    if not isinstance(value, str):
        return check_count(name, value)
    if value == FIXED and mode != "simple":
        return value
    raise ValueError(
        f"{name} must be a whole number of at least 1, or {FIXED!r} unless mode is 'simple'; got "
        f"{value!r} with mode={mode!r}."
    )
