"""Pictures of a fit: whatever holds a fit in, matplotlib Axes out.

A fit is a fitted estimator, an AnnData object with results, what `fit_model` returned, or a model
trained in any way. No function shows or saves a figure, and none changes matplotlib's settings.
Colour maps are perceptually uniform and safe for the colour-blind. The room imports from `analysis`
and the rooms above that. Begin with :mod:`~pnmf_pyro.plotting.maps`.
"""

from pnmf_pyro.analysis.lengthscales import lengthscale_profile
from pnmf_pyro.plotting.calibration import plot_calibration
from pnmf_pyro.plotting.checks import plot_predictive_check, plot_selection
from pnmf_pyro.plotting.diagnostics import plot_elbo, plot_lengthscale_profile
from pnmf_pyro.plotting.domains import plot_domains
from pnmf_pyro.plotting.features import (
    plot_component_images,
    plot_factor_correlation,
    plot_loadings,
    plot_samples,
    plot_top_features,
    plot_volcano,
)
from pnmf_pyro.plotting.figures import new_figure
from pnmf_pyro.plotting.groups import plot_group_levels
from pnmf_pyro.plotting.importance import plot_importance_of_space
from pnmf_pyro.plotting.maps import plot_factors, plot_spatial, plot_uncertainty
from pnmf_pyro.plotting.tissue import MapStyle

__all__ = [
    "MapStyle",
    "lengthscale_profile",
    "new_figure",
    "plot_calibration",
    "plot_component_images",
    "plot_domains",
    "plot_elbo",
    "plot_factor_correlation",
    "plot_factors",
    "plot_group_levels",
    "plot_importance_of_space",
    "plot_lengthscale_profile",
    "plot_loadings",
    "plot_predictive_check",
    "plot_samples",
    "plot_selection",
    "plot_spatial",
    "plot_top_features",
    "plot_uncertainty",
    "plot_volcano",
]
