"""The Poisson factorisation: a Pyro model and its guide."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution

from pnmf_pyro.custom_modules import POSITIVE_MODES, PositiveParameter
from pnmf_pyro.data.batches import Batch, take
from pnmf_pyro.data.checks import MODES, check_choice, check_count, check_data, like_data
from pnmf_pyro.data.counts import Counts, transposed_counts
from pnmf_pyro.data.random_state import RandomState, torch_generator
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors import Prior

ALL = Batch()


class PoissonFactorization(nn.Module):
    """X_ij ~ Poisson(s_i sum_l W_jl exp F_il), with a prior on F and non-negative W.

    To change the model, subclass it and write another :meth:`model` or :meth:`guide`; a new
    parameter is a `torch.nn.Parameter` of the subclass. :func:`~pnmf_pyro.fit_model` trains it.

    Parameters
    ----------
    prior : Prior
        Prior of F and its variational family.
    y : Tensor of shape (D, N)
        Data; only its shape, floating-point type and device are used, so a tensor on the device
        "meta" does.
    L : int
        Number of components.
    loadings_mode : {'softplus', 'exp', 'projected', 'multiplicative'}
        How W stays non-negative, see :class:`PositiveParameter`.
    mode : {'simple', 'expanded', 'lower-bound'}
        Form of the ELBO.
    size_factors : Tensor of shape (N,), optional
        s, positive; 1 unless given.
    random_state : int, RandomState or None
        For the loadings to start from.

    Attributes
    ----------
    W : PositiveParameter of shape (D, L)
        Loadings.
    D, N, L : int
        Number of features, samples and components.

    Examples
    --------
    >>> import torch
    >>> from pnmf_pyro.priors import GaussianPrior
    >>> from pnmf_pyro.models import PoissonFactorization
    >>> y = torch.poisson(torch.ones(100, 50))
    >>> model = PoissonFactorization(GaussianPrior(y, L=10), y, L=10)
    >>> terms, qF, pF = model(E=10, X=y)
    >>> tuple(qF.loc.shape)
    (10, 50)
    """

    size_factors: Tensor | None

    def __init__(
        self,
        prior: Prior,
        y: Any,
        L: int = 10,
        loadings_mode: str = "softplus",
        mode: str = "expanded",
        *,
        size_factors: Tensor | None = None,
        random_state: RandomState = None,
    ):
        super().__init__()
        check_choice("loadings_mode", loadings_mode, POSITIVE_MODES)
        check_choice("mode", mode, MODES)
        check_data(y)
        self.D, self.N = (int(size) for size in y.shape)
        if (prior.L, prior.N) != (L, self.N):
            raise ValueError(
                f"prior must be over L={L} components and N={self.N} samples, like y and L; it is "
                f"over L={prior.L} and N={prior.N}."
            )
        self.L = L
        self.prior = prior
        self.loadings_mode = loadings_mode
        self.mode = mode
        self.W = PositiveParameter((self.D, L), loadings_mode, mode)
        self.W.assign(torch.rand(self.D, L, generator=torch_generator(random_state)) + 0.5)
        like_data(self.W, y)
        s = None if size_factors is None else size_factors.to(self.W.device, self.W.dtype)
        self.register_buffer("size_factors", s)

    def model(self, batch: Batch = ALL) -> Tensor:
        """Generate counts of shape (n, d), or observe those of the batch."""
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        with samples, poutine.scale(scale=batch.likelihood_scale):
            observed: Any = batch.counts
            return pyro.sample("X", self.likelihood(F, batch), obs=observed)

    def likelihood(self, F: Tensor, batch: Batch = ALL) -> PoissonFactors:
        """Return the distribution of the batch's counts given F, Poisson.

        Its `mean`, s_i sum_l W_jl exp F_il for the samples and features of the batch, is what
        another likelihood may start from.

        Parameters
        ----------
        F : Tensor of shape (..., L, n)
        batch : Batch
        """
        W = take(self.W.data, batch.features, dim=0)
        return PoissonFactors(F, W, take(self.size_factors, batch.samples), validate_args=False)

    def guide(self, batch: Batch = ALL) -> Tensor:
        """Draw F from q."""
        return self.prior.guide(batch, batch.plate(self.N))

    def assign(self, W: Tensor, exp_F: Tensor, scale: float = 0.1) -> None:
        """Start from loadings W (D, L) and factors exp F (N, L), with a common scale of q(F)."""
        mean = exp_F.T.log()
        self.prior.assign(mean, torch.full_like(mean, scale))
        typical = W.mean(1, keepdim=True)
        self.W.set_unit(typical.clamp_min(typical[typical > 0].min() if (typical > 0).any() else 1))
        self.W.assign(W)

    def expected_totals(self, batch: Batch = ALL) -> Tensor:
        """Return sum_i s_i E exp F_il over all samples, as the batch estimates it, shape (L,)."""
        with torch.no_grad():
            q = self.prior.marginal(batch.samples)
            factors = (q.loc + q.variance / 2).exp()
            if self.size_factors is not None:
                factors = factors * take(self.size_factors, batch.samples)
            scale = self.N / factors.shape[1]
            return scale * factors.sum(1, dtype=torch.float64).to(factors.dtype)

    def project_parameters(self) -> None:
        """Clamp the loadings at zero in `projected` mode."""
        self.W.project()

    def get_rate(self, prior_samples: Tensor, idy: Any = None) -> Tensor:
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
        idx: Any = None,
        idy: Any = None,
        E: int = 10,
        X: Any = None,
        coordinates: Any = None,
        groups: Any = None,
        spatial: bool = False,
    ) -> tuple[Any, ...]:
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
        """
        placed = spatial or coordinates is not None or groups is not None
        distributions = self.prior.distributions(idx, coordinates, groups, placed)
        qF = distributions[0]
        terms = self.compute_log_likelihood_terms(qF, E, X, idx=idx, idy=idy, return_samples=True)
        return terms, *distributions

    def compute_log_likelihood_terms(
        self,
        qF: Distribution,
        E: int = 10,
        X: Any = None,
        *,
        idx: Any = None,
        idy: Any = None,
        return_samples: bool = False,
    ) -> dict[str, Any]:
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
        terms["size_factors"] = take(self.size_factors, idx)
        W = take(self.W.data, idy, dim=0)
        if X is not None:
            counts = X if isinstance(X, Counts) else transposed_counts(X)
            terms |= self._likelihood(
                PoissonFactors(qF.mean, W, terms["size_factors"], validate_args=False),
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

    def _moments(self, qF: Distribution, n_draws: int) -> dict[str, Any]:
        terms = {"exp_mu": qF.mean.exp(), "exp_mu_sigma": (qF.mean + qF.variance / 2).exp()}
        if self.mode != "lower-bound":
            check_count("E", n_draws)
            terms["exp_F_samples"] = qF.rsample(torch.Size([n_draws])).exp()
        return terms

    def _likelihood(
        self, likelihood: PoissonFactors, counts: Counts, terms: dict[str, Any]
    ) -> dict[str, Tensor]:
        fields = terms.get("exp_F_samples", terms["exp_mu"][None])
        expected = fields.mean(0) if self.mode == "simple" else terms["exp_mu_sigma"]
        log_rate, total_rate, constant = likelihood.expected_terms(counts, list(fields), expected)
        value = log_rate - total_rate + constant
        return {"log_rate": log_rate, "total_rate": total_rate, "log_likelihood": value}
