"""How a fit went, and how sure its lengthscale is."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from pnmf_pyro.data.checks import check_array, check_counts
from pnmf_pyro.data.places import extent, spacing
from pnmf_pyro.data.random_state import check_random_state
from pnmf_pyro.estimator.results import Results, is_anndata, results_of
from pnmf_pyro.plotting.figures import BLUE, one_axes, plain
from pnmf_pyro.training.hyperparameters import HyperparameterSearch

# Lengthscales of a profile that are tried without being asked for.
PROFILED = 25


def plot_elbo(history: Any, ax: Any = None, *, label: str | None = None, key: str = "pnmf") -> Any:
    """Plot the ELBO against the steps of a fit.

    The vertical axis shows the last nine tenths of the steps in full; the first, often far below,
    may leave the picture.

    Parameters
    ----------
    history : sequence of float, PNMF or AnnData
        ELBO values in nats, or a fit.
    ax : matplotlib Axes, optional
        Drawn in a new figure unless given.
    label : str, optional
        Of the line, for a legend.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    matplotlib Axes
    """
    values = _elbo_values(history, key)
    ax = one_axes(ax, (5, 3.2))
    ax.plot(np.arange(1, len(values) + 1), values, label=label, lw=1.5)
    late = values[len(values) // 10 :]
    margin = 0.08 * (np.ptp(late) or 1.0)
    ax.set_ylim(late.min() - margin, late.max() + margin)
    ax.set(xlabel="iteration", ylabel="ELBO (nats)")
    plain(ax)
    return ax


def _elbo_values(history: Any, key: str) -> np.ndarray:
    if isinstance(history, Results) or is_anndata(history) or hasattr(history, "get_params"):
        return results_of(history, key).elbo_history
    return check_array("history", history).astype(np.float64)


def plot_lengthscale_profile(model: Any, X: Any, lengthscales: Any = None, ax: Any = None) -> Any:
    """Plot how well samples are predicted without themselves, against the lengthscale.

    All components have the lengthscale of the horizontal axis, all else is as in the fit; marks
    below show what the fit has learned for each component. Lower is better: what is shown is the
    distance from the best, up to three times that of the median; more may leave the picture. A flat
    stretch says that the data do not tell its lengthscales apart.

    Parameters
    ----------
    model : PNMF
        Fitted, spatial.
    X : array-like or sparse matrix of shape (n_samples, n_features)
        Counts of the fit.
    lengthscales : array-like of shape (n,), optional
        In the unit of the coordinates; from half their spacing to their extent or the longest
        learned unless given.
    ax : matplotlib Axes, optional
        Drawn in a new figure unless given.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        For a model that is not spatial, and for X or lengthscales that do not fit.
    """
    tried, loss = lengthscale_profile(model, X, lengthscales)
    ax = one_axes(ax, (5, 3.2))
    excess = loss - loss.min()
    ax.plot(tried, excess, color=BLUE, lw=1.5, marker="o", ms=3)
    learned = model.model_.prior.kernel.lengthscale.detach().cpu().numpy()
    ax.plot(
        learned,
        np.full(len(learned), 0.03),
        "|",
        color="black",
        ms=12,
        mew=1.5,
        transform=ax.get_xaxis_transform(),
        label="learned, by component",
    )
    ax.set(xscale="log", xlabel="lengthscale", ylabel="loss above the best (nats per sample)")
    top = 3 * np.median(excess)
    if top > 0:
        ax.set_ylim(-0.08 * top, top)
    ax.legend(frameon=False, fontsize=8)
    plain(ax)
    return ax


def lengthscale_profile(
    model: Any, X: Any, lengthscales: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return lengthscales and the criterion there, which :func:`plot_lengthscale_profile` shows.

    Parameters
    ----------
    model, X, lengthscales
        As there.

    Returns
    -------
    lengthscales, loss : ndarray of shape (n,)
        The loss in nats per sample, to be low.
    """
    check_is_fitted(model)
    if not model.spatial:
        raise ValueError("model must be spatial to have lengthscales; this one knows no space.")
    module = model.model_
    counts = check_counts(X)
    if counts.shape != (module.N, module.D):
        raise ValueError(
            f"X must be the counts of the fit, of shape {(module.N, module.D)}; got {counts.shape}."
        )
    if lengthscales is None:
        places = module.prior.places
        longest = max(extent(places), float(module.prior.kernel.lengthscale.max()))
        lengthscales = np.geomspace(spacing(places) / 2, longest, PROFILED)
    tried = np.atleast_1d(check_array("lengthscales", lengthscales).astype(np.float64))
    if tried.ndim != 1 or not (np.isfinite(tried) & (tried > 0)).all():
        raise ValueError(f"lengthscales must be positive finite numbers; got {lengthscales!r}.")
    counts = counts.to(module.W.device).to(module.W.dtype)
    random = check_random_state(model.random_state)
    search = HyperparameterSearch(module, counts, (), model.criterion, random)
    return tried, search.profile(module, tried)
