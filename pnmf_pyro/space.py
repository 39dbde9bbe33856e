"""Where the samples of a spatial model are, and its inducing points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pnmf_pyro.inducing import inducing_points
from pnmf_pyro.places import (
    GroupCodes,
    Places,
    check_coordinates,
    check_extent,
    warn_lengthscale,
)


@dataclass
class Space:
    """Where the samples of a spatial model are.

    Attributes
    ----------
    places : Places of shape (N,)
    inducing : Places of shape (M,)
    groups : GroupCodes or None
        Names of the groups of a multi-group model.
    """

    places: Places
    inducing: Places
    groups: GroupCodes | None


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
    if parameters.local:
        raise ValueError(
            "local=True is not available in this version: locally conditioned priors (LCGP) "
            "are still to come. Use local=False, which works through inducing points."
        )
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
    inducing = inducing_points(
        places, parameters.num_inducing, parameters.inducing_allocation, random
    )
    return Space(places, inducing, codes)


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
        for name in ("place", "inducing")
    )
    return Space(places, inducing, None if groups is None else GroupCodes(groups))
