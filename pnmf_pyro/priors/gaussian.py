"""Independent normal log-factors."""

from __future__ import annotations

import pyro
import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import Batch, Index, put, take
from pnmf_pyro.data.checks import check_count, check_data, check_number, like_data
from pnmf_pyro.data.places import Places
from pnmf_pyro.priors.base import Draws, Prior, Sites


class _MeanScale(nn.Module):
    """N(mean, scale^2), each of shape (L, N), in mean and standard deviation."""

    def __init__(self, L: int, N: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(L, N))
        self.scale = PositiveParameter((L, N))

    def normal(self, index: Index | None) -> Normal:
        loc, scale = take(self.mean, index), take(self.scale.data, index)
        return Normal(loc, scale, validate_args=False)

    def assign(self, mean: Tensor, scale: Tensor) -> None:
        with torch.no_grad():
            self.mean.copy_(mean)
        self.scale.assign(scale)

    @property
    def theta1(self) -> Tensor:
        return self.mean / self.scale.data.square()

    @property
    def theta2(self) -> Tensor:
        return -0.5 / self.scale.data.square()


class _Natural(nn.Module):
    """N(mean, scale^2) in natural parameters mean / scale^2 and -1 / (2 scale^2)."""

    def __init__(self, L: int, N: int):
        super().__init__()
        self.theta1 = nn.Parameter(torch.zeros(L, N))
        self.theta2 = nn.Parameter(torch.full((L, N), -0.5))

    def normal(self, index: Index | None) -> Normal:
        theta1, theta2 = take(self.theta1, index), take(self.theta2, index)
        variance = -0.5 * theta2.reciprocal()
        return Normal(theta1 * variance, variance.sqrt(), validate_args=False)

    def assign(self, mean: Tensor, scale: Tensor) -> None:
        with torch.no_grad():
            self.theta1.copy_(mean / scale.square())
            self.theta2.copy_(-0.5 / scale.square())

    @property
    def mean(self) -> Tensor:
        return -0.5 * self.theta1 / self.theta2

    @property
    def scale(self) -> Tensor:
        return (-0.5 * self.theta2.reciprocal()).sqrt()


class Unseen:
    """F of samples that have not been seen: N(0, scale^2), independent, for L components."""

    def __init__(self, scale: Tensor, L: int, N: int):
        self.scale, self.L, self.N = scale, L, N

    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return F_il of the samples `index` (all if None), with loc and scale (L, n)."""
        scale = self.scale.expand(self.L, self.N if index is None else len(index))
        return Normal(torch.zeros_like(scale), scale, validate_args=False)

    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws there, (n_draws, L, n)."""
        return lambda index: self.marginal(index).rsample(torch.Size([n_draws]))


class GaussianPrior(Prior):
    """F_il ~ N(0, scale_pf^2), independent, with q(F_il) = N(mean_il, scale_il^2).

    Parameters
    ----------
    y : Tensor of shape (D, N)
        Data; only its shape, floating-point type and device are used, so a tensor on the device
        "meta" does.
    L : int
        Number of components.
    scale_pf : float
        Standard deviation of the prior.
    use_natural_gradients : bool
        Hold q in its natural parameters theta1 = mean / scale^2 and theta2 = -1 / (2 scale^2), for
        training by :class:`~pnmf_pyro.priors.natural.SiteSteps`.

    Attributes
    ----------
    mean, scale : Tensor or parameter of shape (L, N)
        Of q; the trained parameters unless `use_natural_gradients`.
    theta1, theta2 : Tensor or parameter of shape (L, N)
        The same in natural parameters; the trained ones if `use_natural_gradients`.
    scale_pf : Tensor
        Standard deviation of the prior, fixed.

    Examples
    --------
    >>> import torch
    >>> from pnmf_pyro.priors import GaussianPrior
    >>> y = torch.randn(100, 50)  # 100 features, 50 samples
    >>> prior = GaussianPrior(y, L=10)
    >>> qF, pF = prior()
    >>> tuple(qF.rsample((5,)).shape)
    (5, 10, 50)
    """

    LARGEST_RISE = 1.0
    independent = True

    scale_pf: Tensor

    def __init__(
        self, y: Tensor, L: int = 10, scale_pf: float = 1.0, use_natural_gradients: bool = False
    ):
        super().__init__()
        check_data(y)
        self.L = check_count("L", L)
        self.N = int(y.shape[1])
        self.use_natural_gradients = use_natural_gradients
        check_number("scale_pf", scale_pf, 1e-15, 1e15)
        self.register_buffer("scale_pf", torch.tensor(float(scale_pf), dtype=torch.float64))
        self.q: _Natural | _MeanScale = (_Natural if use_natural_gradients else _MeanScale)(
            L, self.N
        )
        like_data(self, y)

    @property
    def mean(self) -> Tensor:
        """Mean of q, (L, N)."""
        return self.q.mean

    @property
    def scale(self) -> Tensor | PositiveParameter:
        """Standard deviation of q, (L, N)."""
        return self.q.scale

    @property
    def theta1(self) -> Tensor:
        """First natural parameter of q, mean / scale^2, (L, N)."""
        return self.q.theta1

    @property
    def theta2(self) -> Tensor:
        """Second natural parameter of q, -1 / (2 scale^2), (L, N)."""
        return self.q.theta2

    def forward(self) -> tuple[Normal, Normal]:
        """Return q(F) and p(F), each of shape (L, N)."""
        return self.forward_batched(None)

    def forward_batched(self, idx: Index | None) -> tuple[Normal, Normal]:
        """Return q(F) and p(F) of the samples `idx`, each of shape (L, n).

        Parameters
        ----------
        idx : Tensor of int64, or anything that selects samples; None for all
        """
        q = self.marginal(idx)
        return q, Normal(torch.zeros_like(q.loc), self.scale_pf, validate_args=False)

    def marginal(self, index: Index | None = None) -> Normal:
        """Return q(F_il) for the samples `index` (all if None), with loc and scale (L, n)."""
        return self.q.normal(index)

    def model(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Draw F from the prior, shape (L, n)."""
        with self.local_plates(batch, samples):
            zero = torch.zeros_like(self.scale_pf)
            return pyro.sample("F", Normal(zero, self.scale_pf, validate_args=False))

    def guide(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Draw F from q, shape (L, n)."""
        with self.local_plates(batch, samples):
            return pyro.sample("F", self.watch(self.marginal(batch.samples)))

    def assign(self, mean: Tensor, scale: Tensor) -> None:
        """Set q to N(mean, scale^2), each of shape (L, N)."""
        self.q.assign(mean, scale)

    def beside(self, places: Places) -> Unseen:
        """Return the prior: no sample says anything of others."""
        return Unseen(self.scale_pf.to(self.q.mean), self.L, len(places))

    def before(self, places: Places) -> Normal:
        """Return the prior of samples at places, with loc and scale (L, n)."""
        return self.beside(places).marginal()

    @property
    def natural(self) -> bool:
        """Whether q is held in natural parameters."""
        return self.use_natural_gradients

    def sites(self, index: Tensor | None = None) -> Sites:
        """Return the sites of samples: what theta says beyond the prior; each (L, n)."""
        self.check_sites()
        theta1, theta2 = take(self.theta1, index), take(self.theta2, index)
        precision = -2 * theta2 - self.scale_pf.square().reciprocal()
        return Sites(precision.to(theta1), theta1, -0.5 * theta1 / theta2)

    def apart_from_own(self, precision: Tensor) -> Tensor:
        """Return the precision of the prior: no other sample says anything of F_il."""
        return self.scale_pf.square().reciprocal().double().expand(precision.shape)

    @torch.no_grad()
    def posterior_from_sites(
        self,
        precision: Tensor | None,
        shift: Tensor,
        index: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """Set q to the posterior given sites: precision 1 / scale_pf^2 + h, mean b / precision."""
        self.check_sites()
        if precision is not None:
            precision = precision + self.scale_pf.square().reciprocal().to(precision)
            put(self.theta2, -precision / 2, index)
        put(self.theta1, shift if mean is None else -2 * take(self.theta2, index) * mean, index)

    @torch.no_grad()
    def towards_sites(
        self, precision: Tensor | None, shift: Tensor, index: Tensor | None = None
    ) -> None:
        """Take a step to the posterior given sites that does not go too far.

        Rates are exponential in mean and variance of q, so a long step upwards overshoots. Where
        the step would raise a mean by delta > 0, it rises by log(1 + delta), which with the
        variance fixed never passes the optimum. A variance rises by `LARGEST_RISE` at most.
        """
        theta1, theta2 = take(self.theta1, index), take(self.theta2, index)
        variance = -0.5 / theta2
        mean = theta1 * variance
        wanted = -2 * theta2
        if precision is not None:
            wanted = precision + self.scale_pf.square().reciprocal().to(precision)
        bounded = torch.maximum(wanted, variance.add_(self.LARGEST_RISE).reciprocal_())
        change = torch.addcmul(shift, wanted, mean, value=-1).div_(bounded)
        mean += torch.where(change > 0, change.log1p(), change)
        put(self.theta1, mean.mul_(bounded), index)
        put(self.theta2, bounded.mul_(-0.5), index)

    def natural_parameters(self) -> list[nn.Parameter]:
        """Return theta1 and theta2 as parameters, for a natural-gradient optimiser of one's own.

        Raises
        ------
        ValueError
            If the prior was made without `use_natural_gradients`.
        """
        if not isinstance(self.q, _Natural):
            raise ValueError(
                "natural_parameters() needs GaussianPrior(..., use_natural_gradients=True); this "
                "prior is trained in mean and scale."
            )
        return [self.q.theta1, self.q.theta2]
