r"""How much of what a fit expects is due to space.

Where some components are fields over places and others know no space (`non_spatial_components`),
the expected count of a sample and a feature is a sum over both,

.. math:: s_i \sum_{l \in S} f_{il} W_{jl} + s_i \sum_{l \notin S} f_{il} W_{jl},

with S the fields and :math:`f_{il} = E \exp F_{il}`. The share of the first, over all features of
a sample or over all samples of a feature, is the importance of space to it (Townes and Engelhardt
2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pnmf_pyro.analysis.interpretation import contributions
from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.checks import check_choice
from pnmf_pyro.estimator.results import Fit, Results, results_of

if TYPE_CHECKING:
    from pandas import DataFrame

UNITS = ("features", "samples", "components")


def importance_of_space(
    fit: Fit, of: str = "features", *, key: str = "pnmf"
) -> DataFrame | np.ndarray:
    r"""Return which share of the expected counts is due to components that are smooth in space.

    .. math::

       \mathrm{features}: \;
       \frac{\sum_{l \in S} W_{jl} \sum_i s_i f_{il}}{\sum_l W_{jl} \sum_i s_i f_{il}},
       \qquad \mathrm{samples}: \;
       \frac{\sum_{l \in S} f_{il} \sum_j W_{jl}}{\sum_l f_{il} \sum_j W_{jl}}

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit with components of both kinds, see :func:`~pnmf_pyro.estimator.results.results_of`.
    of : {'features', 'samples', 'components'}
        Unit of which it is said.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    DataFrame
        Columns `feature` or `sample` and `importance`, from 0 for what is free of space to 1, and
        NaN where nothing is expected; for components `component`, `in_space`, and `share`, its part
        of all expected counts. A structured array without pandas.

    Raises
    ------
    ValueError
        For a fit whose components are all of one kind.
    """
    check_choice("of", of, UNITS)
    found = both_kinds(results_of(fit, key))
    if of == "components":
        counts = contributions(found).sum(0)
        numbers = np.arange(found.n_components)
        share = counts / counts.sum()
        return as_table({"component": numbers, "in_space": found.in_space, "share": share})
    unit = of[:-1]
    names = found.feature_names if unit == "feature" else np.arange(len(found.factors))
    return as_table({unit: names, "importance": found.importance_of_space(unit)})


def both_kinds(found: Results) -> Results:
    """Return results with components of both kinds; a ValueError for any other."""
    if found.in_space.all() or not found.in_space.any():
        kind = "are fields over places" if found.in_space.all() else "know no space"
        raise ValueError(
            f"fit must have components that are smooth in space and others; all of this one {kind}."
            " Fit coordinates with non_spatial_components=."
        )
    return found
