"""Which parameters act, given the others: the one table of what has an effect when."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from pnmf_pyro.data.checks import warn
from pnmf_pyro.estimator.parameters import Settings, closed_form, learned
from pnmf_pyro.estimator.stages import WarmUp
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.multi_group import MultiGroupKernel


class Condition(NamedTuple):
    """When a parameter acts: a test of all parameters, and the same in words."""

    holds: Callable[[Settings], bool]
    words: str


def _by_gradient(settings: Settings) -> bool:
    return settings.training_mode == "standard" or settings.loadings_mode != "multiplicative"


def _draws(settings: Settings) -> bool:
    modes = [getattr(stage, "mode", None) for stage in settings.stages or ()]
    return any(mode not in (None, "lower-bound") for mode in (settings.mode, *modes))


def _starts_at_lengthscale(settings: Settings) -> bool:
    own = isinstance(settings.kernel, SpatialKernel)
    return settings.spatial and not own and "lengthscale" not in learned(settings)


def _has_plain_prior(settings: Settings) -> bool:
    first = any(isinstance(stage, WarmUp) for stage in settings.stages or ())
    own = not closed_form(settings) and settings.stages is None
    plain = not settings.spatial or settings.non_spatial_components > 0
    return first or own or (plain and settings.prior is None)


BY_GRADIENT = Condition(
    _by_gradient, "training_mode='standard' or loadings_mode is another than 'multiplicative'"
)
ONE_CYCLE = Condition(
    lambda s: _by_gradient(s) and s.scheduler == "one_cycle", "gradient steps have this scheduler"
)
PLATEAU = Condition(
    lambda s: _by_gradient(s) and s.scheduler == "plateau", "scheduler='plateau' of gradient steps"
)
BATCHES = Condition(lambda s: s.batch_size is not None, "batch_size is given")
FEATURE_BATCHES = Condition(lambda s: s.y_batch_size is not None, "y_batch_size is given")
SPATIAL = Condition(lambda s: s.spatial, "spatial=True")
INDUCING = Condition(lambda s: s.spatial and not s.local, "spatial=True and local=False")
LOCAL = Condition(lambda s: s.spatial and s.local, "spatial=True and local=True")

ACTS = {
    **dict.fromkeys(("learning_rate", "optimizer"), BY_GRADIENT),
    "scheduler": Condition(lambda s: _by_gradient(s) or s.scheduler is None, BY_GRADIENT.words),
    **dict.fromkeys(("scheduler_patience", "scheduler_factor", "min_lr"), PLATEAU),
    **dict.fromkeys(
        ("scheduler_pct_start", "scheduler_div_factor", "scheduler_final_div_factor"), ONE_CYCLE
    ),
    "tol": Condition(lambda s: s.max_iter >= 20 or s.tol == 0, "max_iter is at least 20"),
    "E": Condition(_draws, "mode is another than 'lower-bound'"),
    "shuffle": Condition(
        lambda s: s.batch_size is not None or s.y_batch_size is not None,
        "batch_size or y_batch_size is given",
    ),
    "scale_kl_NM": BATCHES,
    "scale_ll_D": FEATURE_BATCHES,
    **dict.fromkeys(("local", "kernel", "multigroup", "train_lengthscale"), SPATIAL),
    "non_spatial_components": SPATIAL,
    "learn": Condition(
        lambda s: s.spatial or s.prior is not None or not s.learn, "spatial=True, or with a prior"
    ),
    "lengthscale": Condition(
        _starts_at_lengthscale,
        "spatial=True, the lengthscale is not learned (train_lengthscale=False) and the kernel "
        "brings none",
    ),
    "sigma": Condition(
        lambda s: s.spatial and not isinstance(s.kernel, SpatialKernel),
        "spatial=True and the kernel brings none",
    ),
    "group_diff_param": Condition(
        lambda s: (
            s.spatial
            and s.multigroup
            and not isinstance(s.kernel, SpatialKernel | MultiGroupKernel)
        ),
        "spatial=True, multigroup=True and the kernel brings none",
    ),
    **dict.fromkeys(("num_inducing", "jitter", "diagonal_only"), INDUCING),
    "inducing_allocation": Condition(
        lambda s: s.spatial and s.multigroup and not s.local,
        "spatial=True, multigroup=True and local=False",
    ),
    **dict.fromkeys(("K", "precompute_knn", "neighbors"), LOCAL),
    "cholesky_mode": Condition(
        lambda s: s.spatial and (s.training_mode == "standard" or s.diagonal_only),
        "spatial=True and training_mode='standard'",
    ),
    "scale_pf": Condition(_has_plain_prior, "there are factors that know no space"),
}


def without_effect(settings: Settings) -> list[str]:
    """Return the names of parameters that are not at their default and have no effect."""
    defaults = inspect.signature(type(settings)).parameters
    return [
        name
        for name, condition in ACTS.items()
        if not _same(getattr(settings, name), defaults[name].default)
        and not condition.holds(settings)
    ]


def warn_without_effect(settings: Settings) -> None:
    """Warn of parameters that were set and have no effect, and say when they would have one."""
    for name in without_effect(settings):
        warn(
            f"{name}={getattr(settings, name)!r} has no effect here: it acts where "
            f"{ACTS[name].words}. Leave it out, or set that."
        )


def _same(value: object, default: object) -> bool:
    try:
        return bool(value == default)
    except (TypeError, ValueError, RuntimeError):  # an array is not one value
        return False
