"""The recommended fit in one call."""

from __future__ import annotations

import logging
from typing import Any

from pnmf_pyro.estimator import PNMF

logger = logging.getLogger("pnmf_pyro")

# Steps in closed form, which have no learning rate to choose: from a decomposition of the counts
# first up a bound without noise until that has nearly settled, then up the tighter one.
RECIPE: dict[str, Any] = {
    "mode": "expanded",
    "warm_up": True,
    "training_mode": "natural",
    "loadings_mode": "multiplicative",
    "scale_pf": "auto",
    "E": 1,
    "init": None,
    "max_iter": 500,
    "random_state": 0,
}

# In space: first without it, then hyperparameters by prediction, then the fields.
SPATIAL: dict[str, Any] = {
    **RECIPE,
    "mode": "lower-bound",
    "spatial": True,
    "train_lengthscale": True,
    "train_sigma": True,
}

# Up to so many samples each place is an inducing point; beyond, each is conditioned on its
# neighbours. Where that is not wanted (local=False), there are this many inducing points. On
# sim_nsf_S1 (1,170 places) neighbours predict 0.2% worse than inducing points at all places, in 28%
# of the time; on osmfish_cortex (5,313 places) they take less than a third of the time that 1,000
# inducing points take.
ALL_INDUCING = 1500
INDUCING = 1000


PRIORS = {
    False: "summarised by inducing points (SVGP)",
    True: "each conditioned on its neighbours (LCGP, local=True)",
}


def fit(
    X: Any,
    coords: Any = None,
    groups: Any = None,
    *,
    n_components: int = 10,
    size_factors: Any = None,
    **parameters: Any,
) -> PNMF:
    """Fit a factorisation with settings that need no tuning.

    Parameters
    ----------
    X : array-like, Tensor, DataFrame or sparse matrix of shape (n_samples, n_features)
        Counts.
    coords : array-like of shape (n_samples, p), optional
        Where the samples are, in any unit: the factors are then smooth in space. Up to 1,500
        samples are all inducing points; more are conditioned on their neighbours (`local=True`),
        which takes time in proportion to their number. The log says which.
    groups : array-like of shape (n_samples,), optional
        Slices or batches that share less than their places say: what they share is learned.
    n_components : int
    size_factors : array-like of shape (n_samples,), optional
        Positive factor on all rates of a sample.
    **parameters
        Any parameter of :class:`PNMF`, in place of the recommended value.

    Returns
    -------
    PNMF
        Fitted.

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> X = np.random.default_rng(0).poisson(5, size=(60, 20))
    >>> model = pnmf_pyro.fit(X, n_components=2)
    >>> model.components_.shape
    (2, 20)
    """
    chosen = {**(RECIPE if coords is None else _spatial(len(coords), groups)), **parameters}
    model = PNMF(n_components=n_components, **chosen)
    described = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    logger.info("fit with n_components=%d, %s", n_components, described)
    if model.spatial:
        logger.info("%d places, %s", len(coords), PRIORS[model.local])
    return model.fit(X, coordinates=coords, groups=groups, size_factors=size_factors)


def _spatial(n_samples: int, groups: Any) -> dict[str, Any]:
    """The recipe in space, by size and groups."""
    num_inducing = n_samples if n_samples <= ALL_INDUCING else INDUCING
    local = n_samples > ALL_INDUCING
    chosen = {**SPATIAL, "num_inducing": num_inducing, "local": local}
    if groups is not None:
        chosen |= {"multigroup": True, "train_group_diff_param": True}
    return chosen
