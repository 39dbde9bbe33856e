"""The evidence lower bound, analytic where it can be and by draws where it cannot.

For latent sample statements the divergence KL(q || p) is taken in closed form where torch has a
rule for it. An observed :class:`PoissonFactors` whose log-factors are a normal draw of the guide is
integrated by its own `expected_log_prob`. Everything else, such as a likelihood or a prior of the
user's, is averaged over `n_draws` runs of guide and model, and the log says so at the first step.
So the objective never asks which model it was given.

A guide may state the marginal distribution of a value, with whatever it was drawn from integrated
out: `pyro.sample("F", q_given_u, infer={"marginal": q})`. Where closed forms integrate all latent
values out, guide and model are run once, at the means of such marginals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
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

from pnmf_pyro.data.checks import MODES, check_choice
from pnmf_pyro.models.points import FIXED, check_draws
from pnmf_pyro.models.poisson import PoissonFactors

logger = logging.getLogger("pnmf_pyro")

NORMAL_MARGINALS = (Normal, MultivariateNormal, LowRankMultivariateNormal)

Program = Callable[..., object]
Statement = Any  # a node of a trace: Pyro's own type says no more
Traces = tuple[Trace, Trace]


class FactorizationELBO(ELBO):
    r"""ELBO of a factorisation, in nats, for the whole data set, constants included.

    .. math:: \sum_{ij} E_q \log \mathrm{Poisson}(X_{ij} | s_i \textstyle\sum_l W_{jl} \exp F_{il})
        - KL(q || p)

    Parameters
    ----------
    mode : {'simple', 'expanded', 'lower-bound'}
        How the expectation of a Poisson factorisation is taken, see
        :meth:`PoissonFactors.expected_log_prob`.
    n_draws : int or 'fixed'
        Monte Carlo draws for each term that needs them; `fixed`, of `expanded` mode, for points in
        their place, see :mod:`pnmf_pyro.models.points`, so that the value has no noise.
    newton : bool
        Take gradients for natural-gradient steps: those of the expected log-likelihood alone, in
        variances from curvatures, see :meth:`PoissonFactors.expected_log_prob`.
    kl_weight : float
        Factor on the divergence; only 1 gives a bound on the likelihood.
    """

    def __init__(
        self,
        mode: str = "expanded",
        n_draws: int | str = 3,
        newton: bool = False,
        kl_weight: float = 1.0,
    ):
        self.mode = check_choice("mode", mode, MODES)
        self.n_draws = check_draws("n_draws", n_draws, mode)
        super().__init__(num_particles=1 if isinstance(n_draws, str) else n_draws)
        self.newton = newton
        self.kl_weight = kl_weight
        self._told: set[str] = set()

    def terms(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Return the two terms of the bound, differentiable, in float64.

        Returns
        -------
        dict
            `log_likelihood`, the expected log-likelihood, and `kl`, the divergence of q from the
            prior; the ELBO is their difference.

        Raises
        ------
        ValueError
            In `lower-bound` mode, where an observed statement has no closed form.
        """
        means = _MarginalMeans()
        traces = self._get_trace(model, means(guide), args, kwargs)
        divergences = _divergences(traces)
        drawn = self._drawn(traces, divergences)
        n_runs, n_inner = (int(self.n_draws), 1) if drawn else (1, self.n_draws)
        zero = torch.zeros((), dtype=torch.float64)
        found = {"log_likelihood": zero, "kl": zero}
        for run in range(n_runs):
            if run or (drawn and means.used):
                traces = self._get_trace(model, guide, args, kwargs)
                divergences = _divergences(traces)
            for statement in _statements(traces):
                if statement["is_observed"]:
                    term, value = "log_likelihood", self._expected(statement, traces, n_inner)
                else:
                    term, value = "kl", divergences[statement["name"]]
                if value is None:
                    value = _sampled(statement, traces[1])
                if self.newton and term == "kl":
                    value = value.detach()
                found[term] = found[term] + _weighted_sum(value, statement) / n_runs
        return found

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Traces:
        """Run the guide, and the model on its values."""
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace)
        return model_trace, guide_trace

    def _drawn(self, traces: Traces, divergences: dict[str, Tensor | None]) -> bool:
        """Say whether the values of a run count, since no closed form integrates them out."""
        no_rule = "KL(q || p) has no closed form for it"
        averaged = {name: no_rule for name, kl in divergences.items() if kl is None}
        integrated = set()
        for statement in _statements(traces):
            if not statement["is_observed"]:
                continue
            name, source = statement["name"], _source_of_log_factors(statement["fn"], traces)
            if isinstance(source, str):
                averaged[name] = source
                self._check_mode(name, source)
            else:
                integrated |= {source["name"], *source["infer"].get("made_of", ())}
        self._tell(averaged)
        nodes = traces[1].nodes
        free = [n for n in divergences if n not in integrated and _marginal(nodes[n]) is None]
        return bool(averaged or free)

    def _check_mode(self, name: str, reason: str) -> None:
        if self.mode == "lower-bound" or self.n_draws == FIXED:
            without = "mode='lower-bound'" if self.mode == "lower-bound" else "E='fixed'"
            raise ValueError(
                f"{without} has no draws, and {name} needs them: {reason}. Use mode='expanded' or "
                "'simple' and a number of draws."
            )

    def _tell(self, averaged: dict[str, str]) -> None:
        """Log once, when gradients are taken, what is averaged over draws and why."""
        if torch.is_grad_enabled():
            for name in averaged.keys() - self._told:
                logger.warning(
                    "%s: averaged over %s draws; %s.", name, self.n_draws, averaged[name]
                )
            self._told |= averaged.keys()

    def _expected(self, statement: Statement, traces: Traces, n_draws: int | str) -> Tensor | None:
        """Expected log density of an observed statement in closed form, or None."""
        source = _source_of_log_factors(statement["fn"], traces)
        if isinstance(source, str):
            return None
        q = _marginal(source) or source["fn"]
        return statement["fn"].expected_log_prob(
            statement["value"], q, self.mode, n_draws, newton=self.newton
        )

    def differentiable_loss(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Tensor:
        """Return the negative ELBO as a tensor to differentiate."""
        terms = self.terms(model, guide, *args, **kwargs)
        return self.kl_weight * terms["kl"] - terms["log_likelihood"]

    def loss(self, model: Program, guide: Program, *args: object, **kwargs: object) -> float:
        """Return the negative ELBO as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> float:
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


class _MarginalMeans(Messenger):
    """Give the values of a guide that have a stated marginal the mean of it."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def _pyro_sample(self, msg: Message) -> None:
        q = _marginal(msg)
        if msg["value"] is None and q is not None:
            msg["value"] = q.mean.view_as(q.mean)  # a tensor of its own, by which it is known
            msg["done"] = self.used = True


def _marginal(statement: Statement) -> Distribution | None:
    """The marginal distribution that a guide states of a value."""
    return (statement.get("infer") or {}).get("marginal")


def _statements(traces: Traces) -> list[Statement]:
    """Sample statements of the model, and those of the guide on which one of the model depends.

    Deterministic ones have no density and no part in the bound.
    """
    model_trace, guide_trace = traces
    nodes = {**guide_trace.nodes, **model_trace.nodes}
    return [n for n in nodes.values() if _has_density(n)]


def _has_density(statement: Statement) -> bool:
    if statement["type"] != "sample" or site_is_subsample(statement):
        return False
    return not (statement["infer"] or {}).get("_deterministic")


def _divergences(traces: Traces) -> dict[str, Tensor | None]:
    """KL(q || p) of each latent statement in closed form, None where there is none."""
    latent = (s for s in _statements(traces) if not s["is_observed"])
    return {s["name"]: _divergence(s, traces[1].nodes[s["name"]]) for s in latent}


def _divergence(statement: Statement, guided: Statement) -> Tensor | None:
    if isinstance(guided["fn"], Delta) or guided is statement:
        return None
    try:
        return kl_divergence(guided["fn"], statement["fn"])
    except NotImplementedError:
        return None


def _source_of_log_factors(likelihood: Distribution, traces: Traces) -> Statement | str:
    """Find the guide's statement of which the log-factors are a draw, or say why there is none."""
    if not isinstance(likelihood, PoissonFactors):
        return f"its type is {type(likelihood).__name__}, and only PoissonFactors has a closed form"
    source = _statement_of(likelihood.log_factors, traces)
    if source is None:
        return "its log-factors are not themselves a value that the guide draws"
    if not isinstance(_marginal(source) or source["fn"], NORMAL_MARGINALS):
        return f"the guide draws its log-factors from a {type(source['fn']).__name__}, not a Normal"
    return source


def _statement_of(value: Tensor, traces: Traces) -> Statement | None:
    """The guide's statement of a value: one that it drew, or both programs make of what it drew."""
    model, guide = ([n for n in t.nodes.values() if n["type"] == "sample"] for t in traces)
    if (drawn := next((n for n in guide if n["value"] is value), None)) is not None:
        return drawn
    made = next((n["name"] for n in model if n["value"] is value), None)
    named: Statement = next((n for n in guide if n["name"] == made), None)
    return named if named is not None and torch.equal(named["value"], value) else None


def _sampled(statement: Statement, guide_trace: Trace) -> Tensor:
    """Estimate of the expected log density, or of the divergence, from the values of one run."""
    log_density = statement["fn"].log_prob(statement["value"])
    if statement["is_observed"]:
        return log_density
    guided: Statement = guide_trace.nodes[statement["name"]]
    if guided is statement:  # auxiliary: the model knows only what the guide makes of it
        return log_density
    return guided["fn"].log_prob(statement["value"]) - log_density


def _weighted_sum(value: Tensor, statement: Statement) -> Tensor:
    return scale_and_mask(value, statement["scale"], statement["mask"]).sum(dtype=torch.float64)
