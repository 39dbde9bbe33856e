r"""Learning of a field's hyperparameters: by predicting each sample without itself.

Near its optimum q(F) behaves as if each sample i told of F_il by one normal observation, its site:
with g and h the slope of the expected log-likelihood in the mean of q(F_il) and its negative
curvature,

.. math:: y_{il} = \mu_{il} + g_{il} / h_{il}, \qquad \mathrm{noise}_{il} = 1 / h_{il}.

Given the sites, the field at a sample without that sample's own site is a Gaussian-process
regression on those of the others (Rasmussen and Williams 2006, section 5.4.2; Vehtari et al. 2016),
here on those of its nearest neighbours, which carry nearly all there is to know: so it costs
O(K^3) a sample, whichever prior the field was fitted with. Predicted means of the counts follow,
and their Poisson deviance judges lengthscale, sigma and mean. The ELBO is the wrong judge: counts
vary more than a Poisson, and it buys short lengthscales to explain that (criterion 'elbo').
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import cast

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.parallel import together
from pnmf_pyro.data.places import extent, spacing
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.gp.kernels import OF_GROUPS, Pairs, fill_symmetric
from pnmf_pyro.gp.neighbors import neighbours_of
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.deviance import deviance
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors import LCGP, SVGP
from pnmf_pyro.training.ends import NUGGET_BOUNDS, SIGMA_BOUNDS, warn_of_ends
from pnmf_pyro.training.site_regression import predict_without, sites

CRITERIA = ("leave-one-out", "elbo")

# Of L-BFGS-B; more change predictions by less than splits of the data do.
ITERATIONS = 10

# Samples that are predicted, at most: drawn at random from larger data.
JUDGED = 1000

# Where the search begins: numbers of lengthscales from the spacing to the extent, and sigmas.
GRID_LENGTHSCALES = 8
GRID_SIGMAS = (0.5, 1.0, 2.0)
GRID_NUGGETS = (0.001, 0.1, 0.3, 1.0)
GRID_GROUP_DIFFERENCES = (0.1, 1.0, 10.0, 100.0)

# Bounds of what is learned beside lengthscales, sigmas and nuggets.
GROUP_DIFFERENCE_BOUNDS = (1e-3, 1e4)

# Standard deviation of a component's hyperparameters, in their logarithms, and of its mean around
# the values that all components share.
SPREAD = 0.1

# The same of a factor on all components.
TOGETHER = 0.5

# The same of what the evidence of the sites says of a component, and how much of that is tried.
APART = 1.0
SHARES = (0.0, 0.5, 1.0)

# What components differ in, and what a factor on all of them may change.
LENGTHS = ("lengthscale", *OF_GROUPS)

# Nats by which samples must be predicted better for components to differ, or another kernel.
TOLD = 2.0


@dataclass
class HyperparameterSearch:
    """Search of the hyperparameters of a spatial model at its present q and loadings.

    Where there are several kernels, one of them is chosen as well.

    Parameters
    ----------
    model : PoissonFactorization
        With a spatial prior.
    counts : Counts of shape (N, D)
    names : sequence of str
        Hyperparameters to learn; the mean is always learned.
    criterion : {'leave-one-out', 'elbo'}
        Deviance of each sample as predicted without it; or the evidence of the sites, to which the
        ELBO is equal up to a constant where q is at its optimum.
    random : RandomState
        Draws the samples that are predicted where there are more than `JUDGED`.
    field : int
        Number of the prior among those over places. Other components are taken as they are.
    """

    model: PoissonFactorization
    counts: Counts
    names: Sequence[str]
    criterion: str
    random: np.random.RandomState
    field: int = 0

    def __post_init__(self) -> None:
        prior = self.model.prior.fields[self.field]
        self.prior = cast(SVGP | LCGP, prior)
        self.mine = next(mine for part, mine in self.model.prior.of_parts() if part is prior)
        self.kernel, self.places = self.prior.kernel, self.prior.places
        N = len(self.places)
        chosen = np.sort(self.random.permutation(N)[:JUDGED])
        self.judged = torch.from_numpy(chosen).to(self.counts.device)
        of = self.places, self.judged, self.criterion, self.kernel.sizes_of_groups
        self.neighbours = neighbours_of(*of)
        together = torch.cat([self.neighbours, self.judged[:, None]], 1)
        self.pairs = Pairs.within(self.places[together])
        self._once = Cache()
        wanted = [*self.names, *(OF_GROUPS if "group_diff_param" in self.names else ())]
        self.names = [n for n in dict.fromkeys(wanted) if n in self.kernel.hyperparameters]
        self.seen = self.counts if len(chosen) == N else self.counts.rows(self.judged)

    def learn_from(self, source: PoissonFactorization) -> None:
        """Learn hyperparameters from the sites of a fit, and set q to their posterior.

        Parameters
        ----------
        source : PoissonFactorization
            The model itself, or one of the same samples and loadings.
        """
        self.observe(source)
        values, mean = self._best_of_grid()
        values, mean = self._descend(self._apart(values, mean), mean)
        learned = {name: values[name] for name in self.names}
        warn_of_ends(learned, self._grids(), self.kernel.hyperparameters)
        with torch.no_grad():
            for name, value in values.items():
                getattr(self.kernel, name).copy_(value)
            self.prior.mean.copy_(mean)
        self.prior.assign(self.y, self.noise.sqrt())

    def loss(self, values: dict[str, Tensor], mean: Tensor) -> Tensor:
        """Return the criterion per sample, to be minimised; differentiable."""
        if self.criterion == "elbo":
            return self.evidence(values, mean).sum()
        rates = self._rates(*self._predict(values, mean))
        factors = rates.log_factors.exp()
        log_rate, total_rate, constant = rates.expected_terms(self.seen, [factors], factors)
        return -(log_rate - total_rate + constant).sum() / len(self.judged)

    def evidence(
        self, values: dict[str, Tensor], mean: Tensor, components: slice = slice(None)
    ) -> Tensor:
        """Return minus the log-evidence of the sites of l components, (l,), per sample.

        Each site is judged given those of its neighbours that come before it: the chain rule.
        """
        y, noise = self.own_y[components], self.dispersion * self.own_noise[components]
        later = self.neighbours > self.judged[:, None]
        before = torch.where(later, self.judged[:, None], self.neighbours)
        loc, variance = predict_without(
            self._covariance(values), mean, self.judged, before, y, noise
        )
        spread = (variance + noise[:, self.judged]).sqrt()
        seen = torch.distributions.Normal(loc, spread, validate_args=False)
        return -seen.log_prob(y[:, self.judged]).mean(1)

    def _rates(self, loc: Tensor, variance: Tensor) -> PoissonFactors:
        """Counts of the judged samples at the expected factors."""
        before, after = self.others
        expected = torch.cat([before, (loc + variance / 2).to(before), after])
        return self.model.in_closed_form(expected, Batch(samples=self.judged))

    def _predict(self, values: dict[str, Tensor], mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of F at the judged samples, each predicted without itself, (L, n)."""
        covariance = self._covariance(values)
        return predict_without(covariance, mean, self.judged, self.neighbours, self.y, self.noise)

    def _covariance(self, values: dict[str, Tensor]) -> Tensor:
        """Covariance of each judged sample and its neighbours; only the nugget's part made anew."""
        made_of = (self.kernel.chosen, *(values[name] for name in values if name != "nugget"))
        smooth = self._once("smooth", made_of, lambda: self.kernel.smooth_part(self.pairs, values))
        nugget = self.kernel.nugget_part(self.pairs, values)
        return fill_symmetric(smooth + nugget, self.neighbours.shape[1] + 1)

    def observe(self, source: PoissonFactorization) -> None:
        """Take the sites of a fit for what the samples tell."""
        mine, self.dispersion = self.mine, 1.0
        self.y, self.noise = (one[mine] for one in sites(source, self.counts))
        self.own_y, self.own_noise = (one[mine] for one in sites(source, self.counts, True))
        with torch.no_grad():
            q = source.prior.marginal(self.judged)
            expected = (q.loc + q.variance / 2).to(self.model.W.dtype)
        self.others = expected[: mine.start], expected[mine.stop :]

    def profile(self, source: PoissonFactorization, lengthscales: np.ndarray) -> np.ndarray:
        """Return the criterion with one factor on all lengthscales, as the search moves them.

        Parameters
        ----------
        source : PoissonFactorization
            As for :meth:`learn_from`.
        lengthscales : ndarray of shape (n,)
            Geometric means of the components' lengthscales; their ratios stay.

        Returns
        -------
        ndarray of shape (n,)
            Negative log-likelihood in nats per sample.
        """
        self.observe(source)
        mean = self.prior.mean
        values = dict(self.kernel.hyperparameters)
        found = []
        for lengthscale in lengthscales:
            middle = self.kernel.lengthscale.log().mean().exp()
            values["lengthscale"] = self.kernel.lengthscale * (float(lengthscale) / middle)
            with torch.no_grad():
                found.append(float(self.loss(values, mean)))
        return np.array(found)

    @torch.no_grad()
    def _dispersion(self, values: dict[str, Tensor], mean: Tensor) -> float:
        """Mean deviance of the predicted counts, by which they vary more than a Poisson."""
        if self.criterion == "elbo":
            return 1.0
        rates = self._rates(*self._predict(values, mean))
        return max(1.0, deviance(self.seen, rates.product))

    def _start(self) -> Tensor:
        """Mean of the sites by their precision."""
        weights = 1 / self.noise
        return (weights * self.y).sum(1) / weights.sum(1)

    def _grids(self) -> dict[str, Sequence[float] | np.ndarray]:
        low, high = self._limits["lengthscale"]
        return {
            "lengthscale": np.geomspace(2 * low, high / 5, GRID_LENGTHSCALES),
            "sigma": GRID_SIGMAS,
            "nugget": GRID_NUGGETS,
            **dict.fromkeys(OF_GROUPS, GRID_GROUP_DIFFERENCES),
        }

    @cached_property
    def _limits(self) -> dict[str, tuple[float, float]]:
        return {
            "lengthscale": (spacing(self.places) / 2, 10 * extent(self.places)),
            **{"sigma": SIGMA_BOUNDS, "nugget": NUGGET_BOUNDS},
            **dict.fromkeys(OF_GROUPS, GROUP_DIFFERENCE_BOUNDS),
        }

    @torch.no_grad()
    def _best_of_grid(self) -> tuple[dict[str, Tensor], Tensor]:
        """Search the same values for all components, with each kernel that there is to choose.

        Each on the whole grid: from where another kernel is best, a rough one without a nugget is
        not found. The first is taken unless another predicts better for sure: a rough kernel of a
        long lengthscale predicts much as a smooth one of a short lengthscale does.
        """
        values = {k: v[:1].clone() for k, v in self.kernel.hyperparameters.items()}
        for name in self.names:
            values[name].clamp_(*self._limits[name])
        mean, found = self._start(), {}
        for number in range(len(self.kernel.names)):
            self.kernel.choose(number)
            found[number] = self._search(values, mean)
        self.kernel.choose(0)
        self.dispersion = self._dispersion(found[0][1], mean)
        best = self._best([loss for loss, _ in found.values()])
        self.kernel.choose(best)
        n_sets = len(self.kernel.sigma)
        return {k: v.expand(n_sets).clone() for k, v in found[best][1].items()}, mean

    def _search(self, values: dict[str, Tensor], mean: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Return the least loss and where it is: one after another, or jointly what is alike.

        A nugget does what a short lengthscale does as well.
        """
        least = float(self.loss(values, mean))
        grids = {
            name: [values[name].new_tensor([value]) for value in grid]
            for name, grid in self._grids().items()
            if name in values
        }
        for alike in (("lengthscale", "nugget"), ("sigma",), tuple(OF_GROUPS)):
            names = [name for name in alike if name in self.names]
            points = product(*(grids[name] for name in names)) if names else ()
            tried = [values | dict(zip(names, point, strict=True)) for point in points]
            losses = [least, *together().mapped(lambda one: float(self.loss(one, mean)), tried)]
            best = int(np.nanargmin(losses))
            least, values = losses[best], [values, *tried][best]
        return least, values

    def _apart(self, values: dict[str, Tensor], mean: Tensor) -> dict[str, Tensor]:
        """Tell components of many samples apart by evidence, as far as that predicts better.

        The evidence is by far the sharper judge of one component; prediction that of how much of
        it to believe, since counts that vary more than a Poisson mislead the evidence.
        """
        if len(self.kernel.sigma) == 1 or not self.names or len(self.judged) < JUDGED:
            return values
        self.dispersion = self._dispersion(values, mean)
        own = together().mapped(lambda l: self._own(l, values, mean), range(len(mean)))
        apart = [name for name in self.names if name in LENGTHS]
        logs = {name: torch.cat([one[name] for one in own]).log() for name in apart}
        tried = []
        for share in SHARES:
            away = {name: share * (log - log.median()) for name, log in logs.items()}
            tried.append(self._within(values | {k: values[k] * away[k].exp() for k in away}))
        with torch.no_grad():
            return tried[self._best([float(self.loss(one, mean)) for one in tried])]

    def _best(self, losses: Sequence[float]) -> int:
        """Return the number of the least loss, or 0 where that predicts as well."""
        best = int(np.nanargmin(losses))
        gain = len(self.judged) / self.dispersion * (losses[0] - losses[best])
        return 0 if gain <= TOLD else best

    def _own(self, l: int, values: dict[str, Tensor], mean: Tensor) -> dict[str, Tensor]:
        """Hyperparameters of component l by the evidence of its sites, from common values."""
        mine = slice(l, l + 1)
        fixed = {name: value[mine] for name, value in values.items()}
        origin = torch.cat([*(fixed[name].log() for name in self.names), mean[mine]])

        def unpack(x: Tensor) -> dict[str, Tensor]:
            return fixed | dict(zip(self.names, x[:-1].exp().split(1), strict=True))

        def judge(x: Tensor) -> Tensor:
            away = (x - origin).square().sum() / (2 * APART**2)
            return len(self.judged) * self.evidence(unpack(x), x[-1:], mine).sum() + away

        return unpack(self._minimum(judge, origin, self._log_limits(mean[mine])))

    def _within(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values | {name: values[name].clamp(*self._limits[name]) for name in self.names}

    def _log_limits(self, mean: Tensor, sets: int = 1) -> list[tuple[float, float]]:
        """Bounds of the logarithms of hyperparameters, and of means."""
        limits = [tuple(np.log(self._limits[name])) for name in self.names for _ in range(sets)]
        return [*limits, *((level - 5, level + 5) for level in mean.tolist())]

    def _minimum(
        self,
        judge: Callable[[Tensor], Tensor],
        start: Tensor,
        bounds: list[tuple[float, float]],
    ) -> Tensor:
        """Go down from a point by L-BFGS-B."""

        def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
            point = torch.from_numpy(x).to(start).requires_grad_()
            loss = judge(point)
            (gradient,) = torch.autograd.grad(loss, point)
            return float(loss.detach()), gradient.cpu().numpy()

        found = minimize(
            fun,
            start.cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": ITERATIONS},
        )
        return torch.from_numpy(found.x).to(start)

    def _descend(self, values: dict[str, Tensor], mean: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Go down to where samples are predicted best, by L-BFGS-B in logarithms.

        What is maximised is a quasi-likelihood, for counts that vary more than a Poisson
        (Wedderburn 1974). A factor on all components is free; what single components move beside
        it, and their means, have a normal prior: most of what they ask for is noise.
        """
        names, sets = self.names, len(self.kernel.sigma)
        origin = torch.cat([*(values[name].log() for name in names), mean])

        def unpack(x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            *logs, level = (origin + self._moved(x)).split([*[sets] * len(names), len(mean)])
            learned = {name: log.exp() for name, log in zip(names, logs, strict=True)}
            return self._within({**values, **learned}), level

        weight = len(self.judged) / self._dispersion(values, mean)
        free = origin.new_tensor([TOGETHER if name in LENGTHS else SPREAD for name in names])
        spread = torch.cat([free, torch.full_like(origin, SPREAD)])

        def judge(x: Tensor) -> Tensor:
            away = (x / spread).square().sum() / 2
            return weight * self.loss(*unpack(x)) + away

        bounds = []
        for name in names:  # the factor moves the component in the middle within the bounds
            middle = float(values[name].log().median())
            bounds.append(tuple(np.log(self._limits[name]) - middle))
        bounds += [(-5.0, 5.0)] * len(origin)
        start = origin.new_zeros(len(names) + len(origin))
        found = self._minimum(judge, start, bounds)
        with torch.no_grad():
            return unpack(found)

    def _moved(self, x: Tensor) -> Tensor:
        """What each component's own logarithms, and its mean, move: its own part and the common."""
        n, sets = len(self.names), len(self.kernel.sigma)
        common = torch.cat([x[:n].repeat_interleave(sets), x.new_zeros(len(self.prior.mean))])
        return x[n:] + common
