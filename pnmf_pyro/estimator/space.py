"""Where the samples of a spatial model are, and its inducing points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pnmf_pyro.data.checks import warn
from pnmf_pyro.data.places import (
    GroupCodes,
    Places,
    check_coordinates,
    check_extent,
    warn_lengthscale,
)
from pnmf_pyro.gp.inducing import inducing_points


@dataclass
class Space:
    """Where the samples of a spatial model are.

    Attributes
    ----------
    places : Places of shape (N,)
    groups : GroupCodes or None
        Names of the groups of a multi-group model.
    inducing : Places of shape (M,) or None
        None where each place is conditioned on its neighbours.
    seed : int
        Of what is random in that.
    """

    places: Places
    groups: GroupCodes | None
    inducing: Places | None = None
    seed: int = 0


def check_space(
    parameters: Any,
    coordinates: Any,
    groups: Any,
    n_samples: int,
    random: np.random.RandomState,
) -> Space | None:
    """Check where the samples of an estimator with these parameters are.

    Parameters
    ----------
    parameters : Parameters
    coordinates : array-like of shape (n_samples, p) or None
    groups : array-like of shape (n_samples,) or None
    n_samples : int
    random : RandomState
        Chooses inducing points.

    Returns
    -------
    Space, or None for a model that is not spatial

    Raises
    ------
    ValueError
        For places that cannot be used; the message says what to change.
    """
    if not parameters.spatial:
        refuse_places(coordinates, groups)
        return None
    if groups is not None and not parameters.multigroup:
        raise ValueError(
            "groups are used by models with multigroup=True, and multigroup=False. Set it, or "
            "leave groups out to treat all samples as one group."
        )
    codes = GroupCodes.of(groups, n_samples) if parameters.multigroup else None
    places = Places(
        check_coordinates(coordinates, n_samples),
        None if codes is None else codes.encode(groups, n_samples),
    )
    check_extent(places)
    if not parameters.train_lengthscale:
        warn_lengthscale(parameters.lengthscale, places)
    if parameters.local:
        warn_neighbors(parameters.K, len(places))
        return Space(places, codes, seed=int(random.randint(2**31 - 1)))
    inducing = inducing_points(
        places, parameters.num_inducing, parameters.inducing_allocation, random
    )
    return Space(places, codes, inducing)


def warn_neighbors(K: int, n_samples: int) -> None:
    """Warn where more neighbours are asked for than there are."""
    if n_samples - 1 < K:
        warn(
            f"K={K} neighbours were asked for, and a sample has only {n_samples - 1} others; "
            f"K={n_samples - 1} is used. All of them make an exact Gaussian process."
        )


def refuse_places(coordinates: Any, groups: Any) -> None:
    """Raise a ValueError where places are given to a model that is not spatial."""
    if coordinates is not None or groups is not None:
        raise ValueError(
            "coordinates and groups are used by spatial models only, and spatial=False. "
            "Leave them out, or set spatial=True."
        )


def saved_space(state: dict[str, torch.Tensor], groups: list[Any] | None) -> Space | None:
    """Where the samples of a saved model are."""
    if "prior.place_coordinates" not in state:
        return None
    places, inducing = (
        Places(state[f"prior.{name}_coordinates"], state.get(f"prior.{name}_groups"))
        if f"prior.{name}_coordinates" in state
        else None
        for name in ("place", "inducing")
    )
    assert places is not None
    return Space(places, None if groups is None else GroupCodes(groups), inducing)
