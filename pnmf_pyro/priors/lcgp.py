"""Gaussian-process fields that condition each place on its neighbours (LCGP)."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from pyro.contrib.gp.kernels import Kernel
from pyro.distributions import Normal
from torch import Tensor, nn

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import Batch, put, take
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import SpatialKernel, as_spatial_kernel
from pnmf_pyro.gp.neighborhoods import Neighborhoods
from pnmf_pyro.priors.base import Draws, Prior, Sites, stating
from pnmf_pyro.priors.lcgp_distributions import LocalPosterior, VecchiaNormal, draw_given

# How well conjugate gradients solve for means, in posterior standard deviations, and how many
# steps they take at most from where the mean was before.
TOLERANCE = 0.01
MOST_ITERATIONS = 60

# Draws from which variances given sites are worked out.
APART_DRAWS = 30

# Numbers in the arrays that posterior draws are worked out in, and draws at once at least: each
# takes less time beside others than alone.
BLOCK = 1 << 23
DRAWS_AT_ONCE = 4


def draws_at_once(n_factors: int) -> int:
    """Return how many draws of so many log-factors are worked out at once."""
    return max(at_once(1, DRAWS_AT_ONCE), at_once(n_factors, BLOCK))


class _SitePosterior(nn.Module):
    """Mean m and variance d, with the sites whose posterior they are: curvature h and pull b."""

    natural = True
    loc: nn.Parameter
    diagonal: nn.Parameter
    curvature: nn.Parameter
    pull: nn.Parameter

    def __init__(self, L: int, N: int, cholesky_mode: str):
        super().__init__()
        for name, start in (("loc", 0.0), ("diagonal", 1.0), ("curvature", 0.0), ("pull", 0.0)):
            values = torch.full((L, N), start, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))

    def site_curvature(self, precision_diagonal: Tensor) -> Tensor:
        return self.curvature.detach()

    @torch.no_grad()
    def assign(self, loc: Tensor, diagonal: Tensor, curvature: Tensor, pull: Tensor) -> None:
        self.loc.copy_(loc)
        self.diagonal.copy_(diagonal)
        self.curvature.copy_(curvature)
        self.pull.copy_(pull)


class _Scaled(nn.Module):
    """Mean m and standard deviation sqrt(d), trained by their gradients."""

    natural = False

    def __init__(self, L: int, N: int, cholesky_mode: str):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(L, N, dtype=torch.float64))
        self.scale = PositiveParameter((L, N), cholesky_mode).double()

    @property
    def diagonal(self) -> Tensor:
        return self.scale.data.square()

    def site_curvature(self, precision_diagonal: Tensor) -> Tensor:
        """The h for which d = 1 / (Q_ii + h), as where the bound is highest."""
        return (1 / self.diagonal - precision_diagonal).clamp_min(0)

    @torch.no_grad()
    def assign(self, loc: Tensor, diagonal: Tensor, curvature: Tensor, pull: Tensor) -> None:
        self.loc.copy_(loc)
        self.scale.assign(diagonal.sqrt())


class LCGP(Prior):
    r"""A level plus a Gaussian process that conditions each place on K others, with none left out.

    .. math:: F_{\cdot l} \sim N(\mathrm{mean}_l, Q_l^{-1}), \qquad
        Q = (I - B)^T \mathrm{diag}(1 / v) (I - B),

    see :mod:`pnmf_pyro.gp.vecchia`; with K = N - 1 nothing is approximated. The variational
    family has mean m and covariance V V^T + diag(d), for each component. In training V has no
    columns. When that has settled, V is given the posterior's smooth part
    (:meth:`~pnmf_pyro.gp.vecchia_solver.VecchiaPosterior.smooth_part`), with which all else settles
    once more.

    Parameters
    ----------
    kernel : SpatialKernel, Kernel of pyro.contrib.gp, or str
        Covariance of the fields: a :class:`~pnmf_pyro.gp.kernels.SpatialKernel` of one set of
        hyperparameters or one for each component, or what it can be made of.
    places : Places of shape (N,)
        Of the samples.
    L : int
        Number of components.
    K : int
        Neighbours of a place, N - 1 where it is larger.
    neighbors : {'knn', 'probabilistic'}
        How they are chosen among the places before it, see :mod:`pnmf_pyro.gp.neighbors`.
    precompute_knn : bool
        Keep neighbours and their weights. Otherwise they are found anew whenever they are needed,
        several times a step: less memory between steps, and more time for the same result.
    cholesky_mode : {'exp', 'softplus'}
        How sqrt(d) stays positive in standard training.
    use_natural_gradients : bool
        Hold q in sites, for natural-gradient steps; gradient optimisers then leave it alone.
    seed : int
        Of V, and of neighbours where chance has a part.
    dtype : torch.dtype
        Of F; weights of neighbours have the same, all else inside is float64.

    Attributes
    ----------
    mean : Tensor of shape (L,)
        Level of each component.
    low_rank : Tensor of shape (L, N, R)
        V.
    """

    place_coordinates: Tensor
    place_groups: Tensor | None
    mean: Tensor
    low_rank: Tensor
    steps_apart = 3
    given_buffers = (*Prior.given_buffers, "low_rank")

    def __init__(
        self,
        kernel: SpatialKernel | Kernel | str,
        places: Places,
        L: int,
        *,
        K: int = 50,
        neighbors: str = "knn",
        precompute_knn: bool = True,
        cholesky_mode: str = "exp",
        use_natural_gradients: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.L, self.N = int(L), len(places)
        self.kernel, self.dtype, self.seed = as_spatial_kernel(kernel), dtype, seed
        self.register_buffer("place_coordinates", places.coordinates)
        self.register_buffer("place_groups", places.groups)
        self.register_buffer("mean", torch.zeros(L, dtype=torch.float64))
        self.register_buffer("low_rank", torch.zeros(L, self.N, 0, dtype=dtype))
        held = _SitePosterior if use_natural_gradients else _Scaled
        self.q: _SitePosterior | _Scaled = held(L, self.N, cholesky_mode)
        self.neighborhoods = Neighborhoods(
            self.kernel, places, L, K, neighbors, precompute_knn, seed, dtype
        )

    @property
    def places(self) -> Places:
        """Places of the samples."""
        return Places(self.place_coordinates, self.place_groups)

    def model(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Draw F from the prior, shape (L, n)."""
        with self.local_plates(batch, samples):
            return pyro.sample("F", self._prior(batch.samples))

    def guide(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Draw F from q, shape (L, n)."""
        q = self.marginal(batch.samples)
        with self.local_plates(batch, samples):
            return pyro.sample("F", q, infer=stating(self.watch(q)))

    def marginal(self, index: Tensor | None = None) -> LocalPosterior:
        """Return q(F_il) for the samples `index` (all if None), with loc and scale (L, n)."""
        return LocalPosterior(self.q.loc, self.q.diagonal, self.low_rank, index, self.dtype)

    @torch.no_grad()
    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws of q(F), (n_draws, L, n)."""
        shared = self._shared(n_draws)
        return lambda index: self._drawn(shared, index).to(self.dtype)

    def at(self, places: Places) -> LocalFieldAt:
        """Return q(F) at other places."""
        return LocalFieldAt(self, places)

    @property
    def natural(self) -> bool:
        """Whether q is held in sites."""
        return self.q.natural

    @torch.no_grad()
    def assign(self, mean: Tensor, scale: Tensor) -> None:
        """Set q to the posterior from observations `mean` of F with noise `scale`, (L, N)."""
        curvature = scale.double().square().reciprocal()
        pull = curvature * mean.double()
        level = self.mean[:, None].expand_as(pull)
        self.low_rank = self.low_rank[..., :0]
        self.q.assign(*self.solve(curvature, pull, level), curvature, pull)

    def solve(self, curvature: Tensor, pull: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the best d of a q with sites h and b; all of shape (L, N)."""
        posterior, level = self.neighborhoods.posterior, self.mean[:, None]
        found = posterior.solve(
            curvature,
            pull - curvature * level,
            start - level,
            tolerance=TOLERANCE,
            max_iterations=MOST_ITERATIONS,
        )
        return level + found.x, posterior.conditional_variances(curvature)

    @torch.no_grad()
    def apart_from_own(self, precision: Tensor) -> Tensor:
        """Return the precision of each F_il given the sites of all other samples, from draws.

        The variance v given all sites is that of the mean given all other places, in draws, plus
        that given all other places; without its own site a precision is 1 / v - h. It is never
        less than that of the prior.
        """
        h = precision.double()
        prior = self.kernel.variance(self.places).to(h).expand_as(h)
        if not bool(h.any()):
            return 1 / prior
        posterior = self.neighborhoods.posterior
        variance = posterior.conditional_variances(h)
        at_once = draws_at_once(h.numel())
        for start in range(0, APART_DRAWS, at_once):
            n = min(at_once, APART_DRAWS - start)
            of_others = posterior.sample(h, n, self.seed + start, less=1.0).square_().sum(-1)
            variance += of_others / APART_DRAWS
        return torch.maximum(1 / variance - h, 1 / prior)

    @torch.no_grad()
    def coupled(
        self, information: Tensor, told: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Solve with the precision of the field and H, see the base class."""
        found = self.neighborhoods.posterior.solve_coupled(information, told, generator)
        return found, found

    @torch.no_grad()
    def carry(self, places: Places | None, held: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the K nearest samples of places predict, and the variance they leave."""
        if places is None:
            return held, held.new_zeros(held.shape[:2])
        return self.neighborhoods.carry(places, held)

    def sites(self, index: Tensor | None = None) -> Sites:
        """Return the sites of the samples `index` (all if None), each array of shape (L, n)."""
        q = self._held_in_sites()
        return Sites(*(take(one, index) for one in (q.curvature, q.pull, q.loc)))

    @torch.no_grad()
    def posterior_from_sites(
        self,
        precision: Tensor | None,
        shift: Tensor,
        index: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """Set q to the posterior given sites: its mean by one solve with Q + diag(h).

        d = 1 / (Q_ii + h_i) is where the bound is highest over a diagonal covariance.
        """
        q = self._held_in_sites()
        if precision is not None:
            put(q.curvature, precision, index)
        put(q.pull, shift, index)
        if mean is None:
            mean, diagonal = self.solve(q.curvature, q.pull, q.loc)
            q.diagonal.copy_(diagonal)
        q.loc.copy_(mean)

    @torch.no_grad()
    def correlate(self, rank: int = 30) -> None:
        """Set V, of `rank` columns, from draws of the posterior of the present sites.

        They have `seed`.
        """
        posterior = self.neighborhoods.posterior
        curvature = self.q.site_curvature(posterior.factor.precision_diagonal)
        at_once = draws_at_once(self.L * self.N)
        V = curvature.new_empty(self.L, self.N, rank, dtype=self.dtype)
        for start in range(0, rank, at_once):
            n = min(at_once, rank - start)
            columns = V[..., start : start + n]
            columns.copy_(posterior.smooth_part(curvature, n, self.seed + start))
            columns.mul_((n / rank) ** 0.5)
        self.low_rank = V

    def _held_in_sites(self) -> _SitePosterior:
        self.check_sites()
        assert isinstance(self.q, _SitePosterior)
        return self.q

    def _prior(self, index: Tensor | None) -> VecchiaNormal:
        return VecchiaNormal(self.neighborhoods.factor, self.mean, index, self.dtype)

    def _shared(self, n_draws: int) -> Tensor:
        """What draws at all places have in common, (E, L, R)."""
        return torch.randn(n_draws, self.L, self.low_rank.shape[-1]).to(self.low_rank)

    @torch.no_grad()
    def _drawn(self, shared: Tensor, index: Tensor | None) -> Tensor:
        loc, diagonal = take(self.q.loc, index), take(self.q.diagonal, index)
        return draw_given(shared, loc, diagonal, take(self.low_rank, index, dim=1))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: object
    ) -> None:
        self.low_rank = torch.empty_like(state_dict[f"{prefix}low_rank"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class LocalFieldAt:
    """q(F) of an :class:`LCGP` at other places than those of its samples."""

    def __init__(self, prior: LCGP, places: Places):
        self.prior, self.places = prior, places
        self.L, self.N = prior.L, len(places)

    @torch.no_grad()
    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return q(F_il) at the places `index` (all if None), with loc and scale (L, n).

        Each given the K nearest samples.
        """
        prior, places = self.prior, self.places.take(index)
        q = prior.q.loc, prior.q.diagonal, prior.low_rank
        mean, variance = prior.neighborhoods.predict(places, *q, prior.mean)
        loc, scale = (t.to(prior.mean.device, prior.dtype) for t in (mean, variance.sqrt()))
        return Normal(loc, scale, validate_args=False)

    @torch.no_grad()
    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of places to draws of q(F), (n_draws, L, n).

        Places that are asked for together are conditioned on one another; those of different calls
        have in common what V says.
        """
        prior = self.prior
        shared, level = prior._shared(n_draws), prior.mean[:, None, None]

        @torch.no_grad()
        def draw(index: Tensor | None) -> Tensor:
            conditionals = prior.neighborhoods.conditionals(self.places.take(index))
            known = prior._drawn(shared, conditionals.used).movedim(0, -1) - level
            noise = torch.randn(self.L, len(conditionals.order), n_draws, dtype=torch.float64)
            drawn = level + conditionals.draw(known, noise.to(level.device))
            return drawn.movedim(-1, 0).to(prior.dtype)

        return draw
