"""What the parameters of the estimator may be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Protocol, TypeAlias

import numpy as np
from pyro.contrib.gp.kernels import Kernel
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
    check_whole,
)
from pnmf_pyro.data.design import Design
from pnmf_pyro.data.random_state import RandomState
from pnmf_pyro.gp.correlation import check_kernels
from pnmf_pyro.gp.inducing import ALLOCATIONS
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.multi_group import MultiGroupKernel
from pnmf_pyro.initialization import INITS
from pnmf_pyro.models import LIKELIHOODS, PoissonFactorization
from pnmf_pyro.models.factorization import Likelihood, has_closed_form
from pnmf_pyro.models.points import check_draws
from pnmf_pyro.priors import Prior
from pnmf_pyro.priors.svgp import CHOLESKY_MODES
from pnmf_pyro.training.schedules import OPTIMIZERS

# The word for the likelihood that describes hidden entries best.
AUTO = "auto"

HYPERPARAMETERS = ("lengthscale", "sigma", "nugget", "group_diff_param")

Check = Callable[[str, Any], object]


# Where a fit starts: by name, or from loadings.
Start: TypeAlias = str | np.ndarray | None


class Settings(Protocol):
    """Parameters of :class:`~pnmf_pyro.PNMF`, which documents them."""

    n_components: int
    loadings_mode: str
    mode: str
    training_mode: str
    E: int | str
    max_iter: int
    tol: float
    learning_rate: float
    optimizer: str
    random_state: RandomState
    verbose: bool | int
    device: str
    init: Start | list[Start] | tuple[Start, ...]
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
    kernel: str | Kernel | SpatialKernel | Sequence[str | Kernel]
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
    scale_pf: float | str
    learn: Sequence[str]
    stages: Sequence[object] | None
    prior: Prior | None
    likelihood: Likelihood | str | None
    non_spatial_components: int


class FittedEstimator(Settings, Protocol):
    """A fitted :class:`~pnmf_pyro.PNMF`."""

    components_: np.ndarray
    n_components_: int
    groups_: list[Hashable] | None
    group_columns_: tuple[str, ...] | None
    model_: PoissonFactorization
    elbo_: float
    elbo_se_: float
    mean_total_: float | None
    design_: Design | None
    likelihood_: Likelihood | str


def _check_random_state(name: str, value: object) -> None:
    if isinstance(value, np.random.Generator):
        return
    try:
        check_random_state(value)
    except ValueError as error:
        raise ValueError(
            f"{name} must be an int from 0 to 2**32 - 1, a RandomState, a Generator or None; got "
            f"{value!r}."
        ) from error


def _check_up_to(name: str, value: Any, limit: float) -> None:
    if float(check_positive(name, value)) > limit:
        raise ValueError(f"{name} must be at most {limit:g}; got {value!r}.")


def _check_init(name: str, value: object) -> None:
    named = value if isinstance(value, list | tuple) else [value]
    if not named:
        raise ValueError(f"{name} must name at least one start; got none.")
    for one in named:
        if not isinstance(one, np.ndarray):
            check_choice(name, one, (*INITS, None))
        elif one.ndim != 2 or not ((one >= 0) & np.isfinite(one)).all() or not one.any():
            raise ValueError(
                f"{name} must be loadings, features by components, finite and not negative nor all "
                f"zero, or name a start; got an array of shape {one.shape}."
            )


def _check_kernel(name: str, value: Any) -> None:
    if not isinstance(value, SpatialKernel | MultiGroupKernel):
        check_kernels(value)


def _check_scale(name: str, value: Any) -> None:
    if value != "auto":
        check_number(name, value, 1e-15, 1e15)


def _check_learn(name: str, value: object) -> None:
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


def _check_prior(name: str, value: object) -> None:
    if not isinstance(value, Prior):
        raise ValueError(
            f"{name} must be a pnmf_pyro.priors.Prior, made for n_components and the samples of X; "
            f"got {value!r}."
        )


def _check_likelihood(name: str, value: object) -> None:
    if value not in (*LIKELIHOODS, AUTO) and (isinstance(value, str) or not callable(value)):
        raise ValueError(
            f"{name} must be among {', '.join(map(repr, (*LIKELIHOODS, AUTO)))}; or a function, or "
            "a torch module, of (poisson, batch) that returns the distribution of a batch's "
            f"counts; got {value!r}."
        )


def closed_form(settings: Settings) -> bool:
    """Whether the likelihood of a fit has a bound and steps in closed form."""
    return isinstance(settings.likelihood, str) or has_closed_form(settings.likelihood)


def check_combinations(settings: Settings) -> None:
    """Raise a ValueError for parameters that cannot go together."""
    natural = settings.training_mode == "natural"
    check_draws("E", settings.E, settings.mode)
    own = not closed_form(settings)
    if own:
        check_count("E", settings.E)  # there are no points in the place of its draws
    closed = natural or settings.loadings_mode == "multiplicative"
    if own and (closed or settings.mode == "lower-bound"):
        raise ValueError(
            "likelihood: another likelihood than the named ones has no steps in closed form. Set "
            "training_mode='standard', loadings_mode='softplus' and mode='expanded', or leave "
            "likelihood out."
        )
    if settings.spatial and settings.non_spatial_components >= settings.n_components:
        raise ValueError(
            f"non_spatial_components must be smaller than n_components={settings.n_components}, of "
            f"which they are a part; got {settings.non_spatial_components}. For a fit without "
            "space leave spatial=False."
        )
    if settings.prior is not None and settings.spatial:
        raise ValueError(
            "prior: an object knows its places by itself; leave spatial=False and coordinates out, "
            "or leave prior out."
        )
    parts = () if settings.prior is None else (settings.prior, *settings.prior.parts)
    changed = [type(part).__name__ for part in parts if _steps_know_less(type(part))]
    if natural and changed:
        raise ValueError(
            f"prior: {changed[0]} has a `model` of its own, of which "
            "natural-gradient steps know nothing. Set training_mode='standard' and make it with "
            "use_natural_gradients=False, or write its `posterior_from_sites` as well."
        )
    if settings.prior is not None and settings.prior.natural != natural:
        held, named = ("", "natural") if settings.prior.natural else (" not", "standard")
        raise ValueError(
            f"prior: q(F) of this one is{held} held in sites, which natural-gradient steps need. "
            f"Set training_mode={named!r}, or make the prior with use_natural_gradients={natural}."
        )


def _steps_know_less(kind: type[Prior]) -> bool:
    """Whether a subclass changed the prior, and not the posterior that follows from it."""
    classes = kind.__mro__
    model, posterior = (
        next(i for i, one in enumerate(classes) if name in vars(one))
        for name in ("model", "posterior_from_sites")
    )
    return model < posterior < classes.index(Prior)


_CHOICES: dict[str, Collection[str | None]] = {
    "loadings_mode": POSITIVE_MODES,
    "mode": MODES,
    "training_mode": ("standard", "natural"),
    "optimizer": OPTIMIZERS,
    "device": DEVICES,
    "scheduler": ("one_cycle", "plateau", None),
    "cholesky_mode": CHOLESKY_MODES,
    "inducing_allocation": ALLOCATIONS,
    "neighbors": ("knn", "probabilistic"),
}
_COUNTS = ("n_components", "max_iter", "batch_size", "y_batch_size", "num_inducing", "K")
# Positive numbers, and the largest to compute with; a jitter is relative to the variance.
_POSITIVE = {"learning_rate": 1e20, "jitter": 1.0}
_LIMITS = {
    "lengthscale": (1e-100, 1e100),
    "sigma": (1e-15, 1e15),
    "tol": (0.0, inf),
    "verbose": (0, inf),
    "scheduler_factor": (0.0, 1.0),
    "scheduler_pct_start": (0.0, 1.0),
    "scheduler_div_factor": (1.0, inf),
    "scheduler_final_div_factor": (1.0, inf),
    "min_lr": (0.0, inf),
    "group_diff_param": (0.0, 1e100),
}
_FLAGS = (
    *("shuffle", "spatial", "local", "multigroup", "train_lengthscale", "diagonal_only"),
    *("precompute_knn", "scale_ll_D", "scale_kl_NM"),
)
_MAY_BE_NONE = ("batch_size", "y_batch_size", "stages", "prior", "likelihood")

CHECKS: dict[str, Check] = {
    **{name: partial(check_choice, choices=choices) for name, choices in _CHOICES.items()},
    **dict.fromkeys(_COUNTS, check_count),
    **{name: partial(_check_up_to, limit=limit) for name, limit in _POSITIVE.items()},
    **{name: partial(check_number, low=low, high=high) for name, (low, high) in _LIMITS.items()},
    **dict.fromkeys(_FLAGS, check_flag),
    **dict.fromkeys(("scheduler_patience", "non_spatial_components"), check_whole),
    "random_state": _check_random_state,
    "init": _check_init,
    "kernel": _check_kernel,
    "scale_pf": _check_scale,
    "learn": _check_learn,
    "stages": _check_stages,
    "prior": _check_prior,
    "likelihood": _check_likelihood,
}


def check_parameters(settings: Settings) -> None:
    """Raise a ValueError that names a parameter which cannot be used, and says what could."""
    check_values({name: getattr(settings, name) for name in CHECKS})
    check_combinations(settings)


def check_values(values: Mapping[str, Any]) -> None:
    """Raise a ValueError for values that cannot be those of the parameters, whatever the others."""
    for name, value in values.items():
        if name in CHECKS and (value is not None or name not in _MAY_BE_NONE):
            CHECKS[name](name, value)


def learned(settings: Settings) -> list[str]:
    """Return the names of the kernel's hyperparameters that are to be learned."""
    named = {*settings.learn, *(["lengthscale"] if settings.train_lengthscale else [])}
    there = list(HYPERPARAMETERS) if settings.spatial else []
    parts = [] if settings.prior is None else settings.prior.fields
    found = (getattr(part, "kernel", None) for part in parts)
    kernels = [kernel for kernel in found if isinstance(kernel, SpatialKernel)]
    if kernels:
        held = {name for kernel in kernels for name in kernel.hyperparameters}
        there = [name for name in HYPERPARAMETERS if name in held]
    elif not settings.multigroup:
        named -= {"group_diff_param"}
    return [name for name in there if name in named]


def n_spatial(settings: Settings) -> int:
    """Return how many components of a fit in space are fields."""
    return settings.n_components - settings.non_spatial_components
