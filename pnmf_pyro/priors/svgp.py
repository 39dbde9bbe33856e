"""Gaussian-process fields through inducing points (SVGP), over one or several groups."""

from __future__ import annotations

import pyro
import torch
from pyro.contrib.gp.kernels import Kernel
from pyro.distributions import TorchDistribution
from torch import Tensor

from pnmf_pyro.data.batches import Batch, take
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.gp.cholesky import jittered_cholesky
from pnmf_pyro.gp.coupled import conjugate_gradients, times_blocks
from pnmf_pyro.gp.kernels import SpatialKernel, as_spatial_kernel
from pnmf_pyro.priors.base import Draws, Prior, Sites, stating
from pnmf_pyro.priors.fields import (
    FieldGivenInducing,
    FieldMarginals,
    WhitenedPrior,
    each,
    times,
    weighted_gram,
)
from pnmf_pyro.priors.svgp_posterior import (
    CholeskyInducing,
    DiagonalInducing,
    InducingPosterior,
    SiteInducing,
    marginals_of,
    spread_of,
)

CHOLESKY_MODES = ("exp", "softplus")

# Least part of what is known of a sample that others are taken to say, against rounding.
LEAST_OTHERS = 1e-6

# Places up to which what u leaves is drawn jointly, at a cost of the third power of their number.
JOINTLY = 2000


class SVGP(Prior):
    r"""A level plus a Gaussian process, summarised by its values at M inducing points.

    With L_z the Cholesky factor of the covariance at the inducing points z, the field there is
    L_z u, with u ~ N(0, I) under the prior. At a place x, with A = L_z^{-1} K_{zx},

    .. math:: F | u \sim N(\mathrm{mean} + A^T u, \; k_{xx} - A^T A)

    independently over places, and q(F) follows from q(u) = N(m, S) in closed form (Titsias 2009;
    Hensman, Fusi and Lawrence 2013; whitened as in `pyro.contrib.gp.models.VariationalSparseGP`,
    to which it is equal for one component). With an inducing point at each place nothing is
    approximated.

    Parameters
    ----------
    kernel : SpatialKernel, Kernel of pyro.contrib.gp, or str
        Covariance of the fields: a :class:`~pnmf_pyro.gp.kernels.SpatialKernel` of one set of
        hyperparameters or one for each component, or what it can be made of.
    places : Places of shape (N,)
        Of the samples.
    inducing : Places of shape (M,)
        Distinct.
    L : int
        Number of components.
    jitter : float
        Added to the diagonal of the covariance at the inducing points, relative to the variance;
        it grows, with a warning, where the factorisation fails.
    cholesky_mode : {'exp', 'softplus'}
        How the diagonal of the Cholesky factor of S stays positive.
    diagonal_only : bool
        Take S diagonal, in the whitened variable.
    use_natural_gradients : bool
        Hold q(u) in sites, for natural-gradient steps; gradient optimisers then leave it alone.
    dtype : torch.dtype
        Of F; everything inside is float64.

    Attributes
    ----------
    mean : Tensor of shape (L,)
        Level of each component.
    """

    place_coordinates: Tensor
    place_groups: Tensor | None
    inducing_coordinates: Tensor
    inducing_groups: Tensor | None
    mean: Tensor
    q: InducingPosterior
    steps_apart = 10
    cheap_mean = True
    divergence_by_samples = False

    def __init__(
        self,
        kernel: SpatialKernel | Kernel | str,
        places: Places,
        inducing: Places,
        L: int,
        *,
        jitter: float = 1e-5,
        cholesky_mode: str = "exp",
        diagonal_only: bool = False,
        use_natural_gradients: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.L, self.N, self.M = int(L), len(places), len(inducing)
        self.matrix_entries = self.L * self.M * self.N
        self.kernel, self.jitter, self.dtype = as_spatial_kernel(kernel), jitter, dtype
        self.register_buffer("place_coordinates", places.coordinates)
        self.register_buffer("place_groups", places.groups)
        self.register_buffer("inducing_coordinates", inducing.coordinates)
        self.register_buffer("inducing_groups", inducing.groups)
        self.register_buffer("mean", torch.zeros(L, dtype=torch.float64))
        if diagonal_only:
            self.q = DiagonalInducing(L, self.M, cholesky_mode)
        elif use_natural_gradients:
            self.q = SiteInducing(L, self.M, self.N)
        else:
            self.q = CholeskyInducing(L, self.M, cholesky_mode)
        self._once = Cache()

    @property
    def places(self) -> Places:
        """Places of the samples."""
        return Places(self.place_coordinates, self.place_groups)

    @property
    def inducing(self) -> Places:
        """Inducing points."""
        return Places(self.inducing_coordinates, self.inducing_groups)

    def model(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Draw u and F from the prior; return F of the batch, shape (L, n)."""
        u = pyro.sample("u", self._prior())
        with self.local_plates(batch, samples):
            return pyro.sample("F", self._given(u, batch.samples))

    def guide(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Draw u from q(u) and F from what follows; return F of the batch, shape (L, n)."""
        q = self._posterior()
        u = pyro.sample("u", q, infer=stating(q))
        marginal = self.watch(self._at_samples(q, batch.samples))
        with self.local_plates(batch, samples):
            field = self._given(u, batch.samples)
            return pyro.sample("F", field, infer=stating(marginal))

    def marginal(self, index: Tensor | None = None) -> FieldMarginals:
        """Return q(F_il) for the samples `index` (all if None), with loc and scale (L, n)."""
        return self._at_samples(self._posterior(), index)

    @torch.no_grad()
    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws of q(F), (n_draws, L, n)."""
        return self.at(self.places).draws(n_draws)

    def at(self, places: Places) -> FieldAt:
        """Return q(F) at other places."""
        return FieldAt(self, places.to(self.place_coordinates.device))

    @property
    def natural(self) -> bool:
        """Whether q(u) is held in sites."""
        return self.q.natural

    @torch.no_grad()
    def assign(self, mean: Tensor, scale: Tensor) -> None:
        """Set q(u) to the posterior from observations `mean` of F with noise `scale`, (L, N)."""
        precision = scale.double().square().reciprocal()
        shift = precision * (mean.double() - self.mean[:, None])
        self.q.assign(self._design(None)[0], precision, shift)

    @torch.no_grad()
    def apart_from_own(self, precision: Tensor) -> Tensor:
        """Return the precision of each F_il given the sites of all other samples.

        A site takes part in the posterior of A^T u, of variance v: without it that is
        v / (1 - h v). What u leaves comes to that.
        """
        if not bool(precision.any()):
            return 1 / self.kernel.variance(self.places).expand(self.L, -1)
        A, rest = self._design(None)
        h = precision.to(A)
        v = spread_of(A, h).variance_at_samples
        return 1 / (v / (1 - h * v).clamp_min(LEAST_OTHERS) + rest)

    @torch.no_grad()
    def coupled(
        self, information: Tensor, told: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Solve with the precision of u and of what it leaves, given H; see the base class.

        What u leaves, e of variance R, is taken out: the precision of u is I + A H' A^T with
        H' = H - H (1 / R + H)^-1 H.
        """
        A, rest = self._design(None)
        H, R = information.to(A), rest.expand(self.L, -1)
        noise = [torch.zeros(()).to(A)] * 2
        if generator is not None:
            shapes = (self.L, self.M, told.shape[-1]), told.shape
            noise = [torch.randn(shape, generator=generator).to(A) for shape in shapes]
        of_rest = told + noise[1] / R[..., None].sqrt()
        left = torch.linalg.inv(H + torch.diag_embed(1 / R.T))
        reduced = H - H @ left @ H
        tril = [
            torch.linalg.cholesky(g + torch.eye(self.M).to(g))
            for g in weighted_gram(A, reduced.diagonal(dim1=-2, dim2=-1).T.clamp_min(0))
        ]

        def up(x: Tensor) -> Tensor:  # A x
            return torch.stack([a @ one for a, one in zip(each(A, self.L), x, strict=True)])

        def down(u: Tensor) -> Tensor:  # A^T u
            return torch.stack([a.T @ one for a, one in zip(each(A, self.L), u, strict=True)])

        b = noise[0] + up(told - times_blocks(H @ left, of_rest))
        u = conjugate_gradients(
            lambda u: u + up(times_blocks(reduced, down(u))),
            lambda r: torch.stack(
                [torch.cholesky_solve(x, t) for x, t in zip(r, tril, strict=True)]
            ),
            b,
        )
        field = down(u)
        return u, field + times_blocks(left, of_rest - times_blocks(H, field))

    @torch.no_grad()
    def carry(self, places: Places | None, held: Tensor) -> tuple[Tensor, Tensor]:
        """Return A^T u at places, and the variance that u leaves there."""
        A, rest = self._design(None) if places is None else self._design_at(places)
        carried = [a.T @ one for a, one in zip(each(A, self.L), held.to(A), strict=True)]
        return torch.stack(carried), rest.expand(self.L, -1)

    def sites(self, index: Tensor | None = None) -> Sites:
        """Return the sites of the samples `index` (all if None), each array of shape (L, n)."""
        q, level = self._held_in_sites(), self.mean[:, None]
        mean, _ = self._posterior().at_samples()
        w = q.site_precision
        found = (w, q.site_shift + w * level, level + mean)
        return Sites(*(take(one, index) for one in found))

    @torch.no_grad()
    def posterior_from_sites(
        self,
        precision: Tensor | None,
        shift: Tensor,
        index: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """Set q(u) to the posterior given sites, see :mod:`pnmf_pyro.priors.svgp_posterior`."""
        q = self._held_in_sites()
        w = take(q.site_precision, index) if precision is None else precision
        q.move(self._design(None)[0], precision, shift - w * self.mean[:, None], index)

    def _held_in_sites(self) -> SiteInducing:
        self.check_sites()
        assert isinstance(self.q, SiteInducing)
        return self.q

    def _prior(self) -> WhitenedPrior:
        return WhitenedPrior(self.L, self.M, self.mean.device)

    def _posterior(self) -> TorchDistribution:
        """q(u), made once for each state of its parameters."""
        A, _ = self._design(None)
        if not self.natural:  # its graph is consumed by a step
            return self.q.distribution(A)
        made_of = (*self.q.parameters(), *self.kernel.buffers())
        return self._once("posterior", made_of, lambda: self.q.distribution(A))

    def _design(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """A (C, M, n) and the variance that u leaves (C, n), at samples; made once."""
        A, rest = self._once("design", self.kernel.buffers(), lambda: self._design_at(self.places))
        return take(A, index), take(rest, index)

    @torch.no_grad()
    def _design_at(self, places: Places) -> tuple[Tensor, Tensor]:
        Lz = self._once("factor", self.kernel.buffers(), self._factor)
        # One component after another: less memory.
        kernels = (self.kernel.select(c).to(Lz.device) for c in range(len(Lz)))
        A = torch.stack(
            [
                torch.linalg.solve_triangular(tril, one(self.inducing, places)[0], upper=False)
                for one, tril in zip(kernels, Lz, strict=True)
            ]
        )
        rest = self.kernel.variance(places) - A.square().sum(-2)
        lowest = self.jitter * self.kernel.variance(self.inducing).amax(-1, keepdim=True)
        return A, torch.maximum(rest, lowest)

    def _factor(self) -> Tensor:
        return jittered_cholesky(self.kernel(self.inducing, self.inducing), self.jitter)

    def _level(self, u: Tensor, A: Tensor) -> Tensor:
        """Mean of F given u (..., L, M), of shape (..., L, n)."""
        return self.mean[:, None] + times(A.mT, u)

    def _jointly(self, u: Tensor, places: Places) -> Tensor:
        """Draws of F at places given draws of u (E, L, M), of shape (E, L, n)."""
        A, rest = self._design_at(places)
        if len(places) > JOINTLY:
            return self._drawn(u, (A, rest)).to(self.dtype)
        covariance = self.kernel(places, places) - A.mT @ A
        covariance.diagonal(dim1=-2, dim2=-1).copy_(rest)
        level = self._level(u, A)
        tril = jittered_cholesky(covariance, self.jitter, "places")
        return (level + (tril @ torch.randn_like(level)[..., None])[..., 0]).to(self.dtype)

    def _given(self, u: Tensor, index: Tensor | None) -> FieldGivenInducing:
        """F at samples given u (..., L, M), which plates may stand in front of."""
        if u.ndim >= 4:  # the plates over components and samples, which u is not in
            u = u.reshape(*u.shape[:-4], *u.shape[-2:])
        A, rest = self._design(index)
        scale = rest.sqrt().to(self.dtype).expand(self.L, -1)
        return FieldGivenInducing(
            lambda: self._level(u, A).to(self.dtype), scale, leading=u.shape[:-2]
        )

    def _drawn(self, u: Tensor, design: tuple[Tensor, Tensor]) -> Tensor:
        A, rest = design
        level = self._level(u, A)
        return level + rest.sqrt() * torch.randn_like(level)

    def _at_samples(self, q: TorchDistribution, index: Tensor | None) -> FieldMarginals:
        design = self._design(index)
        if self.natural:
            mean, variance = q.at_samples()
            moments = take(mean, index), take(variance, index)
        else:
            moments = marginals_of(q, design[0])
        return self._marginals(q, moments, design)

    def _marginals(
        self, q: TorchDistribution, moments: tuple[Tensor, Tensor], design: tuple[Tensor, Tensor]
    ) -> FieldMarginals:
        """The field from mean and variance of A^T u, with joint draws by those of u."""
        mean, variance = moments
        loc = (self.mean[:, None] + mean).to(self.dtype)
        scale = (variance + design[1]).sqrt().to(self.dtype)
        return FieldMarginals(loc, scale, lambda n: self._drawn(q.sample((n,)), design))


class FieldAt:
    """q(F) of an :class:`SVGP` at other places than those of its samples."""

    def __init__(self, prior: SVGP, places: Places):
        self.prior, self.places = prior, places
        self.L, self.N = prior.L, len(places)

    def marginal(self, index: Tensor | None = None) -> FieldMarginals:
        """Return q(F_il) at the places `index` (all if None), with loc and scale (L, n)."""
        prior, design = self.prior, self.prior._design_at(self.places.take(index))
        q = prior._posterior()
        return prior._marginals(q, marginals_of(q, design[0]), design)

    @torch.no_grad()
    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of places to draws of q(F), (n_draws, L, n).

        Up to `JOINTLY` places that are asked for together are drawn jointly in full; beyond, and
        between calls, they share u.
        """
        u = self.prior._posterior().sample((n_draws,))
        return lambda index: self.prior._jointly(u, self.places.take(index))
