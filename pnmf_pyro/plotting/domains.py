"""Domains of samples, and how sure they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from pnmf_pyro.analysis.clustering import Domains
from pnmf_pyro.data.places import check_coordinates
from pnmf_pyro.plotting.categories import Column
from pnmf_pyro.plotting.figures import AxesLike, check_answer
from pnmf_pyro.plotting.maps import map_columns
from pnmf_pyro.plotting.tissue import MapStyle


def plot_domains(found: Domains, *, axes: AxesLike = None, **style: Any) -> np.ndarray:
    """Map the domains, and beside them how sure each sample's is.

    Parameters
    ----------
    found : Domains
        What :func:`~pnmf_pyro.analysis.clustering.domains` returned, for places in two dimensions.
    axes : array of matplotlib Axes, optional
        Two axes to draw in; those of a new figure unless given.
    **style
        See :class:`MapStyle`.

    Returns
    -------
    ndarray of matplotlib Axes, two
    """
    check_answer("found", found, Domains, "domains")
    if found.coordinates is None:
        raise ValueError("found must be of samples with places; pass coordinates= to domains.")
    look = MapStyle(**{"cmap": "cividis", **style})
    places = check_coordinates(found.coordinates, None)
    names = [str(number) for number in range(found.probabilities.shape[1])]
    columns = [Column(found.labels.astype(np.float64), names), Column(found.certainty)]
    return map_columns(places, columns, found.groups, ["domain", "certainty"], axes, look)
