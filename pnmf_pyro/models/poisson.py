"""The observation of the model: counts whose rates are a product of factors and loadings.

>>> import torch
>>> from pnmf_pyro.models.poisson import PoissonFactors
>>> log_factors, loadings = torch.randn(3, 100), torch.rand(20, 3)
>>> observation = PoissonFactors(log_factors, loadings)
>>> X = observation.sample()
>>> tuple(X.shape)  # 100 samples, 20 features
(100, 20)
>>> tuple(observation.log_prob(X).shape)  # one number for each sample
(100,)
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pnmf_pyro.data.checks import MODES, check_choice
from pnmf_pyro.data.counts import Counts, MatrixLike, as_counts
from pnmf_pyro.data.exposure import Exposure, as_exposure
from pnmf_pyro.data.log_rate import log_rate, log_rate_and_moments
from pnmf_pyro.models.events import count_events
from pnmf_pyro.models.points import FIXED, standard_normals
from pnmf_pyro.models.shapes import leading_shape

# Mean rate below which events are drawn one by one and not a Poisson number for each entry.
SPARSE_RATE = 0.2


class PoissonFactors(TorchDistribution):
    r"""X_ij ~ Poisson(s_i sum_l W_jl exp F_il), independent over i and j.

    A batch is the samples and an event is one sample's row of counts, so that a plate over samples
    scales and subsamples it.

    Parameters
    ----------
    log_factors : Tensor of shape (..., L, n)
        F, as it is drawn in plates of components (dim=-2) and of samples (dim=-1).
    loadings : Tensor of shape (..., d, L)
        W, non-negative. Leading dimensions broadcast with those of F. Loadings drawn with
        `to_event(2)` by vectorised particles have the shape (..., 1, 1, d, L), with the plates of
        components and samples before (d, L); they are understood as well.
    size_factors : Tensor of shape (n,) or (..., 1, n), or Exposure, optional
        s, positive; or what else scales the rates. 1 unless given.
    validate_args : bool, optional
        Whether to refuse loadings that are negative or not finite, size factors that are not
        positive and finite, and values that are no counts. Unless given, as torch and Pyro do by
        default.

    Examples
    --------
    Loadings with a gamma prior, in a program of one's own:

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> import torch
    >>> from pnmf_pyro.models import PoissonFactors
    >>> def program(X, L=2):
    ...     n, d = X.shape
    ...     W = pyro.sample("W", dist.Gamma(1.0, 1.0).expand([d, L]).to_event(2))
    ...     samples = pyro.plate("samples", n, dim=-1)
    ...     with pyro.plate("components", L, dim=-2), samples:
    ...         F = pyro.sample("F", dist.Normal(0.0, 1.0))
    ...     with samples:
    ...         pyro.sample("X", PoissonFactors(F, W), obs=X)
    >>> X = torch.poisson(torch.ones(20, 5))
    >>> guide = pyro.infer.autoguide.AutoNormal(program)
    >>> svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    >>> losses = [svi.step(X) for _ in range(3)]
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(
        self,
        log_factors: Tensor,
        loadings: Tensor,
        size_factors: Tensor | Exposure | None = None,
        validate_args: bool | None = None,
    ):
        self.exposure = as_exposure(size_factors)
        s = self.exposure.size_factors
        if loadings.ndim > max(log_factors.ndim, 3) and tuple(loadings.shape[-4:-2]) == (1, 1):
            loadings = loadings[..., 0, 0, :, :]
        given = [part for part in (log_factors, loadings, s) if part is not None]
        leading = leading_shape(*given)
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in given))
        self.log_factors = log_factors
        self.loadings = loadings.to(dtype)
        # F stands at plate dimensions (..., components, samples): keep the place of components.
        n = log_factors.shape[-1]
        self._own_batch = torch.Size((*leading, 1, n) if leading else (n,))
        super().__init__(self._own_batch, torch.Size(loadings.shape[-2:-1]), validate_args)
        if self._validate_args:
            self._check_parameters()

    def _check_parameters(self) -> None:
        if not bool(((self.loadings >= 0) & self.loadings.isfinite()).all()):
            raise ValueError(
                f"loadings must be finite and not negative; the lowest is {self.loadings.min():g}, "
                f"the highest {self.loadings.max():g}. Take softplus or exp of free parameters."
            )
        s = self.size_factors
        if s is not None and not bool(((s > 0) & s.isfinite()).all()):
            raise ValueError(
                f"size_factors must be positive and finite; the lowest is {s.min():g}, the highest "
                f"{s.max():g}. For a sample without counts use any positive number."
            )

    @property
    def size_factors(self) -> Tensor | None:
        """Size factors s of the samples, where there are any."""
        return self.exposure.size_factors

    def __repr__(self) -> str:
        parts = {name: getattr(self, name) for name in ("log_factors", "loadings", "size_factors")}
        shown = [f"{name}: {tuple(part.shape)}" for name, part in parts.items() if part is not None]
        return f"{type(self).__name__}({', '.join(shown)})"

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> PoissonFactors:
        """Return the same distribution with a batch shape to which its own broadcasts."""
        expanded = copy.copy(self)
        expanded._batch_shape = torch.Size(batch_shape)
        if torch.broadcast_shapes(self.batch_shape, batch_shape) != expanded.batch_shape:
            raise ValueError(f"batch_shape must extend {self.batch_shape}; got {batch_shape}.")
        return expanded

    def mask(self, mask: bool | Tensor) -> MaskedDistribution:
        """Return the distribution of the samples where `mask` is true, of the batch shape."""
        row = torch.Size([self.batch_shape[-1], *self.event_shape])
        if isinstance(mask, Tensor) and mask.shape[-2:] == row != self.batch_shape[-2:]:
            raise ValueError(
                f"mask must be over samples, of shape {tuple(self.batch_shape)}, because a row of "
                "counts is one event; hidden entries are part of an Exposure; got "
                f"{tuple(mask.shape)}."
            )
        return super().mask(mask)

    @property
    def mean(self) -> Tensor:
        """Mean counts, the rates, dense, of shape batch_shape + (d,)."""
        factors, loadings = self.product
        return self._exposed(factors @ loadings.mT).expand(*self.batch_shape, *self.event_shape)

    rate = mean

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, equal to their mean."""
        return self.mean

    @property
    def product(self) -> tuple[Tensor, Tensor]:
        """Factors (..., n, L) and loadings (..., d, L) whose product is the mean.

        Effects and hidden entries of an exposure are no part of it.
        """
        factors = self.exposure.scaled(self.log_factors.exp()).to(self.loadings.dtype).mT
        if len(self._own_batch) == 1:
            return factors, self.loadings
        loadings = self.loadings if self.loadings.ndim == 2 else self.loadings.unsqueeze(-3)
        return factors.unsqueeze(-3), loadings

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw counts of shape sample_shape + batch_shape + (d,).

        Where most of them are zero, it is the single events that are drawn, at a cost that does
        not grow with the number of zeros.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            factors, loadings = self.product
            L = loadings.shape[-1]
            if loadings.ndim == 2 and self.exposure.of_samples_alone:
                totals = factors.reshape(-1, L).sum(0, dtype=torch.float64)
                entries = factors.numel() // L * len(loadings)
                if totals @ loadings.sum(0).double() < SPARSE_RATE * entries:
                    rows = factors.expand(*shape[:-1], L).movedim(-1, 0).reshape(L, -1)
                    return count_events(rows, loadings).reshape(shape)
            return torch.poisson(self.mean.expand(shape))

    def log_prob(self, value: Counts | MatrixLike) -> Tensor:
        """Return the log density of each sample's row.

        Parameters
        ----------
        value : Counts or sparse matrix of shape (n, d), or dense Tensor
            A dense tensor has any shape that broadcasts with batch_shape + (d,). Only stored
            entries are visited where the value is sparse.

        Returns
        -------
        Tensor of the shape to which value.shape[:-1] and batch_shape broadcast
            Of the type of the parameters; sums are taken in float64.
        """
        of_value, tables = self._tables(value)
        n, d = tables[0].shape
        leading = torch.broadcast_shapes(of_value, self._own_batch[:-1])
        numbers = np.broadcast_to(np.arange(len(tables)).reshape(of_value), leading)
        factors, loadings = self.product
        factors = factors.expand(*leading, n, factors.shape[-1])
        loadings = loadings.expand(*leading, d, loadings.shape[-1])
        rows = [
            self._row_log_prob(tables[numbers[index]], factors[index].contiguous(), loadings[index])
            for index in np.ndindex(*leading)
        ]
        values = torch.stack(rows).reshape(*leading, n).to(loadings.dtype)
        return values.expand(torch.broadcast_shapes(values.shape, self.batch_shape))

    def _row_log_prob(self, counts: Counts, factors: Tensor, loadings: Tensor) -> Tensor:
        """Log density of each row given s exp F of shape (n, L), in float64."""
        e = self.exposure.without_size_factors
        fitted = log_rate(counts, factors, loadings) + e.log_at(counts)
        return fitted - e.total(factors.mT, loadings) - counts.log_factorials

    def _tables(self, value: Counts | MatrixLike) -> tuple[torch.Size, list[Counts]]:
        """Leading dimensions of a value, and its tables of shape (n, d) one after another."""
        batch, d = self.batch_shape, self.event_shape[0]
        shape, n = tuple(value.shape), batch[-1]
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        try:
            n = torch.broadcast_shapes(shape[:-1], batch)[-1] if dense else n
            fits = shape[-1:] == (d,) if dense else shape == (n, d)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"value must broadcast with batch_shape + event_shape = {(*batch, d)}, "
                f"or have the shape {(n, d)} where it is sparse; got {shape}."
            )
        if not isinstance(value, Tensor) or not dense or shape == (n, d):
            return torch.Size(), [self._counts(value)]
        tables = value.expand(*shape[:-2], n, d).reshape(-1, n, d)
        return torch.Size(shape[:-2]), [self._counts(table) for table in tables]

    def expected_log_prob(
        self,
        value: Counts | MatrixLike,
        q: Distribution,
        mode: str = "expanded",
        n_draws: int | str = 3,
        *,
        newton: bool = False,
    ) -> Tensor:
        r"""Return E_q[log p(X_i | F, W)] for each sample i, or a bound on it.

        Parameters
        ----------
        value : Counts, Tensor or scipy sparse matrix of shape (n, d)
        q : Distribution
            Distribution of F whose `mean` and `stddev`, of shape (L, n), are those of a normal
            marginal of each F_il. The rate of a sample needs no more than these marginals.
        mode : {'simple', 'expanded', 'lower-bound'}
            `simple` averages the density over draws; `expanded` draws for the expected log rate
            and takes E exp F = exp(mu + sigma^2 / 2) in the expected rate; `lower-bound` replaces
            the first by log sum_l W_jl exp(mu_il), which is no larger: log-sum-exp is convex
            (Jensen).
        n_draws : int or 'fixed'
            Draws from q, not used by `lower-bound`; or points in their place, see
            :mod:`~pnmf_pyro.models.points`, for `expanded`.
        newton : bool
            Take the gradient in the variance of q, which is half the expected curvature (Price's
            theorem), from the curvature at the draws, bounded so that a natural-gradient step
            cannot make a precision negative. What has no noise needs no such care.

        Returns
        -------
        Tensor of shape (n,), float64, constants included
        """
        check_choice("mode", mode, MODES)
        mean, scale = q.mean, q.stddev
        expected = (mean + scale.square() / 2).exp()
        if mode == "lower-bound":
            return self._expectation(value, [mean.exp()], expected)
        newton = newton and n_draws != FIXED and torch.is_grad_enabled()
        spread = scale.detach() if newton else scale
        draws = [(mean + spread * e).exp() for e in standard_normals(mean, n_draws, value)]
        if mode == "simple":
            expected = torch.stack(draws).mean(0)
        if not newton:
            return self._expectation(value, draws, expected)
        counts = self._table(value)
        fields = [draw.T.to(self.loadings.dtype).contiguous() for draw in draws]
        per_draw = [log_rate_and_moments(counts, field, self.loadings) for field in fields]
        log_rate, *moments = (torch.stack(part).mean(0) for part in zip(*per_draw, strict=True))
        h = expected.detach().T * self.rates(counts, expected.detach())
        target = self._variance_gradient(h, *moments)
        if mode == "expanded":  # -h / 2 comes from the expected rate already
            target = target + h / 2
        rise = q.variance - q.variance.detach()
        correction = (target * rise.T).sum(1)
        total_rate = self.total_rate(counts, expected)
        return log_rate - total_rate + self.constant(counts) + correction

    def _variance_gradient(self, h: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Half the expected second derivative in F_il, at most -1/4 sum_j X phi^2; (n, L).

        With h the expected rate of a component and phi its share in a rate, the derivative is
        sum_j X phi (1 - phi) - h, which can be positive far from the optimum and is
        -sum_j X phi^2 where the expected counts sum_j X phi equal h.
        """
        return -torch.maximum(h - first + second, second / 2) / 2

    def _expectation(
        self, value: Counts | MatrixLike, fields: Sequence[Tensor], expected: Tensor
    ) -> Tensor:
        log_rate, total_rate, constant = self.expected_terms(value, fields, expected)
        return log_rate - total_rate + constant

    def expected_terms(
        self, value: Counts | MatrixLike, fields: Sequence[Tensor], expected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three terms of the expected log-likelihood of each sample.

        Parameters
        ----------
        value : Counts, Tensor or scipy sparse matrix of shape (n, d)
        fields : sequence of Tensor of shape (L, n)
            exp F over which the log rate is averaged; one after another, so that memory does not
            grow with their number times the stored counts.
        expected : Tensor of shape (L, n)
            Expectation of exp F.

        Returns
        -------
        log_rate : Tensor of shape (n,), float64
            Mean over fields of sum_j X_ij log sum_l W_jl exp F_il.
        total_rate : Tensor of shape (n,), float64
            s_i sum_l (sum_j W_jl) E exp F_il.
        constant : Tensor of shape (n,), float64
            sum_j X_ij log s_i - log X_ij!.
        """
        counts = self._table(value)
        rows = (field.T.to(self.loadings.dtype).contiguous() for field in fields)
        log_rates = [log_rate(counts, row, self.loadings) for row in rows]
        total_rate, constant = self.total_rate(counts, expected), self.constant(counts)
        return torch.stack(log_rates).mean(0), total_rate, constant

    def total_rate(self, counts: Counts, expected: Tensor) -> Tensor:
        """Return the expected total of each sample, (n,), float64, for E exp F of shape (L, n)."""
        return self.exposure.total(expected, self.loadings)

    def rates(self, counts: Counts, expected: Tensor) -> Tensor:
        """Return the slope of :meth:`total_rate` in E exp F, of shape (n, L) or (1, L)."""
        return self.exposure.rates(self.loadings.detach())

    def informative(self, counts: Counts) -> Counts:
        """Return what of each count tells of its rate, to second order: all of a Poisson's."""
        return counts

    def totals(self, counts: Counts, expected: Tensor) -> Tensor:
        """Return the slope of its sum over samples in the loadings, of shape (d, L) or (1, L)."""
        return self.exposure.totals(expected.mT)

    def constant(self, counts: Counts) -> Tensor:
        """Return the terms of the log density that no factor or loading changes, (n,), float64."""
        if self.exposure.is_none:
            return -counts.log_factorials
        return self.exposure.log_at(counts) - counts.log_factorials

    def _table(self, value: Counts | MatrixLike) -> Counts:
        """Return the counts whose expected density is asked for."""
        if self.loadings.ndim > 2 or (self.size_factors is not None and self.size_factors.ndim > 1):
            raise ValueError(f"loadings (d, L) and size factors (n,) are needed; got {self}.")
        counts = self._counts(value)
        expected = (self.log_factors.shape[-1], *self.event_shape)
        if counts.shape != expected:
            raise ValueError(f"counts must have shape {expected}; got {counts.shape}.")
        return counts

    def _counts(self, value: Counts | MatrixLike) -> Counts:
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "PoissonFactors cannot be traced by torch.jit: take Trace_ELBO in place of "
                "JitTrace_ELBO, and jit_compile=False."
            )
        counts = as_counts(value)
        if self._validate_args and not counts.whole:
            raise ValueError(
                "value must hold counts, finite whole numbers of at least 0. Pass "
                "validate_args=False to PoissonFactors to take numbers that are not whole."
            )
        return counts if counts.dtype == self.loadings.dtype else counts.to(self.loadings.dtype)

    def _exposed(self, products: Tensor) -> Tensor:
        """Products of scaled factors and loadings, with the effects and hidden entries as well."""
        e = self.exposure.without_size_factors.block(slice(0, products.shape[-2]))
        return products if e is None else products * e
