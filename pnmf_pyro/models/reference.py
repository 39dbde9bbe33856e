"""What the reference's API asks of a model beside its programs: rates and terms, one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message, am_i_wrapped
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Normal

from pnmf_pyro.data.batches import Batch, Index, take
from pnmf_pyro.data.checks import check_count
from pnmf_pyro.data.counts import Counts, MatrixLike, transposed_counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.places import Places
from pnmf_pyro.models.poisson import PoissonFactors

if TYPE_CHECKING:
    from pnmf_pyro.custom_modules import PositiveParameter, Terms
    from pnmf_pyro.priors.base import Prior


class ReferenceModel:
    """Rates and terms of the expected log-likelihood, as the reference's models return them.

    Training and inference do not use it: the ELBO takes all it needs from the programs.
    """

    W: PositiveParameter
    prior: Prior
    N: int
    mode: str
    exposure: Exposure

    def get_rate(self, prior_samples: Tensor, idy: Index | None = None) -> Tensor:
        """Return the Poisson rate of draws of F, without size factors.

        Parameters
        ----------
        prior_samples : Tensor of shape (E, L, n)
            Draws of F.
        idy : Tensor of int64, list, array or slice, optional
            Features; all unless given.

        Returns
        -------
        Tensor of shape (E, d, n)
        """
        return take(self.W.data, idy, dim=0) @ prior_samples.exp()

    def forward(
        self,
        idx: Index | None = None,
        idy: Index | None = None,
        E: int = 10,
        X: Counts | MatrixLike | None = None,
        coordinates: Tensor | None = None,
        groups: Tensor | None = None,
        spatial: bool = False,
    ) -> tuple[Terms | Distribution, ...]:
        """Return the terms of the expected log-likelihood, and the distributions of the prior.

        Parameters
        ----------
        idx, idy : Tensor of int64, list, array or slice, optional
            Samples and features; all unless given.
        E : int
            Draws from q, not used in `lower-bound` mode.
        X : Tensor of shape (d, n) or Counts of shape (n, d), optional
            The counts at these features and samples. Where given, draws are worked through one
            after another and no tensor of shape (E, D, N) is made.
        coordinates : Tensor of shape (n, p), optional
            Places of the samples, for a spatial prior; those of the samples `idx` unless given.
        groups : Tensor of shape (n,), optional
            Codes of their groups.
        spatial : bool
            Whether the prior is spatial; coordinates or groups say so as well.

        Returns
        -------
        terms : dict
            See :meth:`compute_log_likelihood_terms`.
        qF, pF : of shape (L, n)
            For a prior without inducing points.
        qF, qU, pU
            For one with them: of the field, and of its whitened values there.

        Raises
        ------
        ValueError
            For places without a spatial prior, and where Pyro calls the module for a program.
        """
        if am_i_wrapped() or isinstance(idx, Batch | Counts):
            raise ValueError(
                "calling the module returns terms of its log-likelihood and makes no sample "
                "statement. Give Pyro its programs, model.model and model.guide."
            )
        placed = spatial or coordinates is not None or groups is not None
        if placed and self.prior.places is None:
            raise ValueError(
                "spatial=True, coordinates and groups need a spatial prior; this model has a "
                f"{type(self.prior).__name__}. Leave them out."
            )
        qF, *others = self._distributions(idx)
        if coordinates is not None:
            qF, pF = self._elsewhere(Places(coordinates.double(), groups))
            others = others if len(others) > 1 else [pF]
        terms = self.compute_log_likelihood_terms(qF, E, X, idx=idx, idy=idy, return_samples=True)
        return terms, qF, *others

    def compute_log_likelihood_terms(
        self,
        qF: Distribution,
        E: int = 10,
        X: Counts | MatrixLike | None = None,
        *,
        idx: Index | None = None,
        idy: Index | None = None,
        return_samples: bool = False,
    ) -> Terms:
        """Return what the expected log-likelihood under q(F) is made of.

        Parameters
        ----------
        qF : Normal of shape (L, n)
        E, X, idx, idy
            As for :meth:`forward`.
        return_samples : bool
            Add the draws of exp F.

        Returns
        -------
        dict
            `exp_mu` and `exp_mu_sigma`, exp(mu) and E exp F of shape (L, n); `exp_F_samples` of
            shape (E, L, n) except in `lower-bound` mode. With X, `log_rate`, `total_rate` and
            `log_likelihood` of shape (n,): term (a), term (b), and the expected log-likelihood of
            each sample with constants and size factors. Without X, `rate_mean` of shape (d, n) in
            `lower-bound` mode and `rate_samples` of shape (E, d, n) in the others.
        """
        terms = self._moments(qF, E)
        exposure = self.exposure.of(idx, idy)
        terms["size_factors"] = exposure.size_factors
        W = take(self.W.data, idy, dim=0)
        if X is not None:
            counts = X if isinstance(X, Counts) else transposed_counts(X)
            terms |= self._likelihood(
                PoissonFactors(qF.mean, W, exposure, validate_args=False),
                counts,
                terms,
            )
        elif self.mode == "lower-bound":
            terms["rate_mean"] = W @ terms["exp_mu"]
        else:
            terms["rate_samples"] = W @ terms["exp_F_samples"]
        if not return_samples:
            terms.pop("exp_F_samples", None)
        return terms

    def _distributions(self, idx: Index | None) -> tuple[Distribution, ...]:
        """q(F) and p(F) at samples, or q(F), q(u) and p(u): what the programs of the prior draw."""
        index = None if idx is None else take(torch.arange(self.N, device=self.W.device), idx)
        if len(self.prior.parts) > 1:
            return self._side_by_side(index)
        batch = Batch(samples=index)
        q, p = _Statements(self.W.device), _Statements(self.W.device)
        with q:
            self.prior.guide(batch, batch.plate(self.N))
        with p:
            self.prior.model(batch, batch.plate(self.N))
        field = q.found.pop("F")
        return (field, *q.found.values(), *(p.found[name] for name in q.found or ["F"]))

    def _side_by_side(self, index: Tensor | None) -> tuple[Distribution, Distribution]:
        """q(F) and the marginals of p(F) at samples, of several priors together."""
        q, places = self.prior.marginal(index), self.prior.places
        if places is None:
            placeless = torch.zeros(self.N, 1, dtype=torch.float64, device=self.W.device)
            places = Places(placeless)
        p = self.prior.before(places.take(index))
        return q, Normal(p.loc.to(q.loc), p.scale.to(q.loc), validate_args=False)

    def _elsewhere(self, places: Places) -> tuple[Distribution, Distribution]:
        """q(F) at other places, and the marginals of p(F) there."""
        q = self.prior.at(places).marginal()
        p = self.prior.before(places)
        return q, Normal(p.loc.to(q.loc), p.scale.to(q.loc), validate_args=False)

    def _moments(self, qF: Distribution, n_draws: int) -> Terms:
        terms: Terms = {"exp_mu": qF.mean.exp(), "exp_mu_sigma": (qF.mean + qF.variance / 2).exp()}
        if self.mode != "lower-bound":
            check_count("E", n_draws)
            terms["exp_F_samples"] = qF.rsample(torch.Size([n_draws])).exp()
        return terms

    def _likelihood(self, likelihood: PoissonFactors, counts: Counts, terms: Terms) -> Terms:
        fields = terms.get("exp_F_samples", terms["exp_mu"][None])
        expected = fields.mean(0) if self.mode == "simple" else terms["exp_mu_sigma"]
        log_rate, total_rate, constant = likelihood.expected_terms(counts, list(fields), expected)
        value = log_rate - total_rate + constant
        return {"log_rate": log_rate, "total_rate": total_rate, "log_likelihood": value}


class _Statements(Messenger):
    """Note the distributions of the latent sample statements of a program, without a draw."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: dict[str, Distribution] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if not site_is_subsample(msg):
            shape = cast(TorchDistribution, msg["fn"]).shape()
            msg["value"], msg["done"] = torch.zeros(shape, device=self.device), True

    def _pyro_post_sample(self, msg: Message) -> None:
        if not site_is_subsample(msg):
            stated = (msg["infer"] or {}).get("marginal", msg["fn"])
            self.found[str(msg["name"])] = cast(Distribution, stated)
