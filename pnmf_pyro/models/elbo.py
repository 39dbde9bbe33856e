"""The evidence lower bound, analytic where it can be and by draws where it cannot.

For latent sites the divergence KL(q || p) is taken in closed form where torch has a rule for it.
An observed :class:`PoissonFactors` whose log-factors are a normal draw of the guide is integrated
by its own `expected_log_prob`. Everything else, such as a likelihood or a prior of the user's, is
averaged over `n_draws` runs of guide and model. So the objective never asks which model it was
given. Draws of a field are dear; where nothing else is latent, no closed form depends on them, and
guide and model are run at its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match
from torch import Tensor
from torch.distributions import (
    Distribution,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from pnmf_pyro.data.checks import MODES, check_choice, check_count
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors.fields import FieldMarginals, WhitenedNormal

FIELDS = (FieldMarginals, WhitenedNormal)
NORMAL_MARGINALS = (Normal, MultivariateNormal, LowRankMultivariateNormal)

Program = Callable[..., Any]
Site = Any


class FactorizationELBO(ELBO):
    r"""ELBO of a factorisation, in nats, for the whole data set, constants included.

    .. math:: \sum_{ij} E_q \log \mathrm{Poisson}(X_{ij} | s_i \textstyle\sum_l W_{jl} \exp F_{il})
        - KL(q || p)

    Parameters
    ----------
    mode : {'simple', 'expanded', 'lower-bound'}
        How the expectation of a Poisson factorisation is taken, see
        :meth:`PoissonFactors.expected_log_prob`.
    n_draws : int
        Monte Carlo draws for each term that needs them.
    newton : bool
        Take gradients in variances from curvatures, for natural-gradient steps, see
        :meth:`PoissonFactors.expected_log_prob`.
    kl_weight : float
        Factor on the divergence; only 1 gives a bound on the likelihood.
    """

    def __init__(
        self,
        mode: str = "expanded",
        n_draws: int = 3,
        newton: bool = False,
        kl_weight: float = 1.0,
    ):
        super().__init__(num_particles=n_draws)
        self.mode = check_choice("mode", mode, MODES)
        self.n_draws = check_count("n_draws", n_draws)
        self.newton = newton
        self.kl_weight = kl_weight

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the two terms of the bound, differentiable, in float64.

        Returns
        -------
        dict
            `log_likelihood`, the expected log-likelihood, and `kl`, the divergence of q from the
            prior; the ELBO is their difference.
        """
        traces, drawn = self._first_run(model, guide, args, kwargs)
        parts: dict[str, list[Tensor]] = {"log_likelihood": [], "kl": []}
        sampled = []
        for name, site in _sites(*traces):
            value = self._analytic(site, traces[1])
            if value is None:
                sampled.append(name)
            else:
                parts[_term_of(site)].append(_weighted_sum(value, site))
        for draw in range(self.n_draws if sampled else 0):
            if draw or not drawn:
                traces = self._get_trace(model, guide, args, kwargs)
            for name in sampled:
                site = dict(_sites(*traces))[name]
                value = _weighted_sum(_sampled(site, traces[1]), site)
                parts[_term_of(site)].append(value / self.n_draws)
        zero = torch.zeros((), dtype=torch.float64)
        return {name: sum(values, zero) for name, values in parts.items()}

    def _first_run(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, Any], bool]:
        """Run guide and model at the means of fields; by draws where another site is latent.

        Returns
        -------
        traces : tuple of Trace
        drawn : bool
            Whether all values are draws.
        """
        fields = _FieldsAtMeans()
        traces = self._get_trace(model, fields(guide), args, kwargs)
        n_latent = sum(not site["is_observed"] for _, site in _sites(*traces))
        if 0 < fields.count < n_latent:
            return self._get_trace(model, guide, args, kwargs), True
        return traces, fields.count == 0

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Run the guide, and the model on its values."""
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace)
        return model_trace, guide_trace

    def _analytic(self, site: Site, guide_trace: Any) -> Tensor | None:
        """Expected log density or divergence in closed form, None where there is none."""
        if not site["is_observed"]:
            q = guide_trace.nodes[site["name"]]["fn"]
            if isinstance(q, Delta) or site is guide_trace.nodes[site["name"]]:
                return None
            try:
                return kl_divergence(q, site["fn"])
            except NotImplementedError:
                return None
        q = _posterior_of_log_factors(site["fn"], guide_trace)
        if q is None:
            return None
        return site["fn"].expected_log_prob(
            site["value"], q, self.mode, self.n_draws, newton=self.newton
        )

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the negative ELBO as a tensor to differentiate."""
        terms = self.terms(model, guide, *args, **kwargs)
        return self.kl_weight * terms["kl"] - terms["log_likelihood"]

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the negative ELBO as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Add the gradients of the negative ELBO to those of the parameters; return its value.

        Raises
        ------
        FloatingPointError
            If the value is NaN or infinite; no gradient is then taken.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the ELBO is {-value}")
        if loss.requires_grad:
            loss.backward()
        return value


class _FieldsAtMeans(Messenger):
    """Give the fields of a program, and what summarises them, their means as values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and isinstance(msg["fn"], FIELDS):
            mean = msg["fn"].mean
            msg["value"] = mean.view_as(mean)  # a tensor of its own, by which the site is known
            msg["done"] = True
            self.count += 1


def _sites(model_trace: Any, guide_trace: Any) -> list[tuple[str, Site]]:
    """Random sites of the model, and those of the guide on which a site of the model depends."""
    nodes = {**guide_trace.nodes, **model_trace.nodes}
    return [
        (name, site)
        for name, site in nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    ]


def _term_of(site: Site) -> str:
    return "log_likelihood" if site["is_observed"] else "kl"


def _posterior_of_log_factors(likelihood: Any, guide_trace: Any) -> Distribution | None:
    """Find the guide's distribution of which the likelihood's log-factors are a draw."""
    if not isinstance(likelihood, PoissonFactors):
        return None
    sites = (site for site in guide_trace.nodes.values() if site["type"] == "sample")
    q = next((s["fn"] for s in sites if s["value"] is likelihood.log_factors), None)
    return q if isinstance(q, NORMAL_MARGINALS) else None


def _sampled(site: Site, guide_trace: Any) -> Tensor:
    """Estimate of the expected log density, or of the divergence, from the values of one run."""
    log_density = site["fn"].log_prob(site["value"])
    if site["is_observed"]:
        return log_density
    guided = guide_trace.nodes[site["name"]]
    if guided is site:  # auxiliary: the model knows only what the guide makes of it
        return log_density
    return guided["fn"].log_prob(site["value"]) - log_density


def _weighted_sum(value: Tensor, site: Site) -> Tensor:
    return scale_and_mask(value, site["scale"], site["mask"]).sum(dtype=torch.float64)
