"""What the parameters of the estimator may be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from sklearn.utils import check_random_state

from pnmf_pyro.custom_modules import POSITIVE_MODES
from pnmf_pyro.data.checks import (
    DEVICES,
    MODES,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_positive,
)
from pnmf_pyro.data.random_state import RandomState
from pnmf_pyro.gp.correlation import check_kernels
from pnmf_pyro.gp.inducing import ALLOCATIONS
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.multi_group import MultiGroupKernel
from pnmf_pyro.initialization import INITS
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.factorization import Likelihood
from pnmf_pyro.priors import Prior
from pnmf_pyro.priors.svgp import CHOLESKY_MODES
from pnmf_pyro.training.schedules import OPTIMIZERS

HYPERPARAMETERS = ("lengthscale", "sigma", "nugget", "group_diff_param")

Check = Callable[[str, Any], object]


class Settings(Protocol):
    """Parameters of :class:`~pnmf_pyro.PNMF`, which documents them."""

    n_components: int
    loadings_mode: str
    mode: str
    training_mode: str
    E: int
    max_iter: int
    tol: float
    learning_rate: float
    optimizer: str
    random_state: RandomState
    verbose: bool | int
    device: str
    init: Any
    scheduler: str | None
    scheduler_patience: int
    scheduler_factor: float
    scheduler_pct_start: float
    scheduler_div_factor: float
    scheduler_final_div_factor: float
    min_lr: float
    batch_size: int | None
    y_batch_size: int | None
    shuffle: bool
    spatial: bool
    local: bool
    kernel: Any
    multigroup: bool
    num_inducing: int
    lengthscale: float
    sigma: float
    group_diff_param: float
    jitter: float
    train_lengthscale: bool
    cholesky_mode: str
    diagonal_only: bool
    inducing_allocation: str
    K: int
    precompute_knn: bool
    neighbors: str
    scale_ll_D: bool
    scale_kl_NM: bool
    scale_pf: Any
    learn: Sequence[str]
    stages: Sequence[Any] | None
    prior: Prior | None
    likelihood: Likelihood | None


class FittedEstimator(Settings, Protocol):
    """A fitted :class:`~pnmf_pyro.PNMF`."""

    components_: np.ndarray
    n_components_: int
    groups_: list[Any] | None
    model_: PoissonFactorization
    elbo_: float


def _choice(choices: Collection[Any]) -> Check:
    return partial(_check_choice, choices=tuple(choices))


def _check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    check_choice(name, value if value is None or isinstance(value, str) else repr(value), choices)


def _number(low: float, high: float = float("inf")) -> Check:
    return partial(check_number, low=low, high=high)


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _check_random_state(name: str, value: Any) -> None:
    try:
        check_random_state(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an int, a RandomState or None; got {value!r}.") from error


def _check_init(name: str, value: Any) -> None:
    named = value if isinstance(value, list | tuple) else [value]
    if not named:
        raise ValueError(f"{name} must name at least one start; got none.")
    for one in named:
        _check_choice(name, one, (*INITS, None))


def _check_kernel(name: str, value: Any) -> None:
    if not isinstance(value, SpatialKernel | MultiGroupKernel):
        check_kernels(value)


def _check_scale(name: str, value: Any) -> None:
    if value != "auto":
        check_positive(name, value)


def _check_learn(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Collection):
        raise ValueError(f"{name} must be a tuple of names among {HYPERPARAMETERS}; got {value!r}.")
    for one in value:
        check_choice(name, one, HYPERPARAMETERS)


def _check_stages(name: str, value: Any) -> None:
    many = isinstance(value, list | tuple)
    if not many or not all(hasattr(one, "plan") and not isinstance(one, type) for one in value):
        raise ValueError(
            f"{name} must be None or a list of stages of pnmf_pyro.estimator.stages, such as "
            f"[WarmUp(), Settle()]; got {value!r}."
        )


def _check_prior(name: str, value: Any) -> None:
    if not isinstance(value, Prior):
        raise ValueError(
            f"{name} must be a pnmf_pyro.priors.Prior, made for n_components and the samples of X; "
            f"got {value!r}."
        )


def _check_likelihood(name: str, value: Any) -> None:
    if not callable(value):
        raise ValueError(
            f"{name} must be a function, or a torch module, of (poisson, batch) that returns the "
            f"distribution of a batch's counts; got {value!r}."
        )


def check_combinations(settings: Settings) -> None:
    """Raise a ValueError for parameters that cannot go together."""
    natural = settings.training_mode == "natural"
    closed = natural or settings.loadings_mode == "multiplicative"
    if settings.likelihood is not None and (closed or settings.mode == "lower-bound"):
        raise ValueError(
            "likelihood: another likelihood than the Poisson has no steps in closed form. Set "
            "training_mode='standard', loadings_mode='softplus' and mode='expanded', or leave "
            "likelihood out."
        )
    if settings.prior is not None and settings.spatial:
        raise ValueError(
            "prior: an object knows its places by itself; leave spatial=False and coordinates out, "
            "or leave prior out."
        )
    if settings.prior is not None and settings.prior.natural != natural:
        held, named = ("", "natural") if settings.prior.natural else (" not", "standard")
        raise ValueError(
            f"prior: q(F) of this one is{held} held in sites, which natural-gradient steps need. "
            f"Set training_mode={named!r}, or make the prior with use_natural_gradients={natural}."
        )


CHECKS: dict[str, Check] = {
    "n_components": check_count,
    "loadings_mode": _choice(POSITIVE_MODES),
    "mode": _choice(MODES),
    "training_mode": _choice(("standard", "natural")),
    "E": check_count,
    "max_iter": check_count,
    "tol": _number(0.0),
    "learning_rate": check_positive,
    "optimizer": _choice(OPTIMIZERS),
    "random_state": _check_random_state,
    "verbose": _number(0),
    "device": _choice(DEVICES),
    "init": _check_init,
    "scheduler": _choice(("one_cycle", "plateau", None)),
    "scheduler_patience": _number(0),
    "scheduler_factor": _number(0.0, 1.0),
    "scheduler_pct_start": _number(0.0, 1.0),
    "scheduler_div_factor": _number(1.0),
    "scheduler_final_div_factor": _number(1.0),
    "min_lr": _number(0.0),
    "batch_size": _optional(check_count),
    "y_batch_size": _optional(check_count),
    "shuffle": check_flag,
    "spatial": check_flag,
    "local": check_flag,
    "kernel": _check_kernel,
    "multigroup": check_flag,
    "num_inducing": check_count,
    "lengthscale": check_positive,
    "sigma": check_positive,
    "group_diff_param": _number(0.0),
    "jitter": check_positive,
    "train_lengthscale": check_flag,
    "cholesky_mode": _choice(CHOLESKY_MODES),
    "diagonal_only": check_flag,
    "inducing_allocation": _choice(ALLOCATIONS),
    "K": check_count,
    "precompute_knn": check_flag,
    "neighbors": _choice(("knn", "probabilistic")),
    "scale_ll_D": check_flag,
    "scale_kl_NM": check_flag,
    "scale_pf": _check_scale,
    "learn": _check_learn,
    "stages": _optional(_check_stages),
    "prior": _optional(_check_prior),
    "likelihood": _optional(_check_likelihood),
}


def check_parameters(settings: Settings) -> None:
    """Raise a ValueError that names a parameter which cannot be used, and says what could."""
    for name, check in CHECKS.items():
        check(name, getattr(settings, name))
    check_combinations(settings)
