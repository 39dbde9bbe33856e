"""Factors, their uncertainty and loadings of a fit, and inference with one side fixed.

Begin with :mod:`~pnmf_pyro.transforms.results`.
"""

from pnmf_pyro.transforms.one_side import transform_F, transform_W
from pnmf_pyro.transforms.results import (
    check_prior,
    errors_of_loadings,
    factor_samples,
    factor_uncertainty,
    factors_from_prior,
    get_factors,
    get_loadings,
    get_prior,
    loading_uncertainty,
    log_factors,
    log_factors_from_prior,
    uncertainty_from_prior,
)

__all__ = [
    "check_prior",
    "errors_of_loadings",
    "factor_samples",
    "factor_uncertainty",
    "factors_from_prior",
    "get_factors",
    "get_loadings",
    "get_prior",
    "loading_uncertainty",
    "log_factors",
    "log_factors_from_prior",
    "transform_F",
    "transform_W",
    "uncertainty_from_prior",
]
