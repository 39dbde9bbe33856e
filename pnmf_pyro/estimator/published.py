"""From data to the attributes of a fitted estimator: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pnmf_pyro.data.checks import check_callback
from pnmf_pyro.data.counts import CountsLike, MaybeArray
from pnmf_pyro.data.parallel import ALONE, processes, working_together
from pnmf_pyro.estimator.checkpoints import Unkept
from pnmf_pyro.estimator.cost import announced
from pnmf_pyro.estimator.effects import warn_without_effect
from pnmf_pyro.estimator.inputs import Scales, read_data
from pnmf_pyro.estimator.likelihood import chosen_likelihood
from pnmf_pyro.estimator.parameters import check_parameters
from pnmf_pyro.estimator.plan import fit_by_plan
from pnmf_pyro.estimator.results import effects_of
from pnmf_pyro.estimator.shares import agree_on_fit, of_all_rows, own_rows
from pnmf_pyro.models import PoissonFactorization


def fit_and_publish(
    estimator: Any,
    X: CountsLike,
    coordinates: MaybeArray,
    groups: MaybeArray,
    scales: Scales,
    callback: Callable[[Any, int, float], None] | None,
    interval: int,
    checkpoint: Unkept,
) -> None:
    """Fit an estimator, see :meth:`PNMF.fit`; one that fails is left as it was."""
    check_callback(callback, interval)
    check_parameters(estimator)
    ranks = processes()
    agree_on_fit(ranks, estimator, scales, callback, checkpoint.path)
    warn_without_effect(estimator)
    before = vars(estimator).copy()

    def report(model: PoissonFactorization, iteration: int, elbo: float) -> None:
        if callback is not None and iteration % interval == 0:
            estimator._publish(model)
            callback(estimator, iteration, elbo)

    try:
        data = read_data(estimator, X, coordinates, groups, scales)
        checkpoint.open(estimator, data, ranks)
        data = own_rows(ranks, data)
        estimator.groups_ = None if data.groups is None else data.groups.names
        estimator.group_columns_ = None if data.groups is None else data.groups.columns
        estimator.mean_total_, estimator.design_ = data.mean_total, data.design
        estimator.keys_ = None
        chosen = checkpoint.once("likelihood", lambda: chosen_likelihood(estimator, data))
        estimator.likelihood_, estimator.likelihood_densities_ = chosen
        costs = announced(estimator, data)
        with working_together(ALONE if data.places is None else ranks):
            fitted = fit_by_plan(estimator, data, report, costs, checkpoint)
        model, estimator.history_, (estimator.elbo_, estimator.elbo_se_) = fitted
        model = of_all_rows(estimator, data, model)
        estimator._publish(model)
        estimator.n_iter_ = len(estimator.history_)
    except BaseException:
        estimator.__dict__ = before  # all of it at once, or an interrupt might leave half
        raise


def publish(estimator: Any, model: PoissonFactorization) -> None:
    """Make a model readable as that of an estimator."""
    estimator.model_ = model
    estimator.components_ = np.ascontiguousarray(model.W.numpy().T)
    r = getattr(model.observation, "dispersion", None)
    estimator.dispersion_ = None if r is None else r.cpu().numpy()
    estimator.n_components_ = estimator.n_components
    vars(estimator).update(effects_of(model.exposure, estimator.design_))
