r"""Calibration: how often intervals hold the truth, in tables that the fitted model makes itself.

Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari and Gelman 2018): draw log-factors
F from the prior and counts given them, infer F from the counts, and find the rank of what was drawn
among draws of the posterior. If the posterior is right, ranks are uniform, whatever the model. So
are those of any quantity that depends on the counts as well (Modrak, Moon, Kim, Bürkner, Huurre,
Faltejsková, Gelman and Vehtari 2023), such as the log-likelihood of a sample.

Ranks of one table depend on each other. One sample of each table, drawn at random, is tested for
each component, so that its ranks are independent (:mod:`~pnmf_pyro.analysis.ranks`). Coverage of
intervals is over all samples; its standard error is from the spread over tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from scipy.stats import binom, norm, t
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pnmf_pyro.analysis.matching import match_factors
from pnmf_pyro.analysis.ranks import gamma, uniform_gammas
from pnmf_pyro.analysis.replicates import BLOCK, draw_counts, draw_latents
from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.checks import check_count, check_flag
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.places import GroupCodes
from pnmf_pyro.data.random_state import RandomState, drawing_from, torch_generator
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors.joint import posterior_of
from pnmf_pyro.training.fitted import Fitted, fitted_module
from pnmf_pyro.training.loop import progress_bar
from pnmf_pyro.training.reinference import infer_again

if TYPE_CHECKING:
    from pandas import DataFrame

LEVELS = (0.5, 0.8, 0.9, 0.95)

# Tables below which a calibration says nothing.
FEWEST = 20

# p-value below which ranks are told from uniform ones, and coverage that is off by no more than
# this is good enough, however many tables there are.
FLAGGED = 0.01
TOLERATED = 0.02

# Draws of the posterior of each table among which the truth has its rank.
DRAWS = 99


class Coverage(NamedTuple):
    """Share of the truth that central intervals of a level hold, and its standard error."""

    share: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """Where the truth lay in the posteriors of simulated tables.

    Attributes
    ----------
    z : ndarray of shape (n_simulations, n_samples, n_components)
        Distance of each log-factor from the mean of its posterior, in standard deviations of it.
    ranks : ndarray of int, shape (n_simulations, n_quantities)
        Number of draws of the posterior below the truth, from 0 to `n_draws`: of each component at
        one sample of each table, and of the log-likelihood of a sample where loadings are known.
    quantities : sequence of str
        Names of what has ranks.
    n_draws : int
        Number of draws of each posterior.
    refit : bool
        Whether each table was fitted as a whole; its loadings were known otherwise.
    unsettled : int
        Number of tables whose fit had not settled.
    """

    z: np.ndarray
    ranks: np.ndarray
    quantities: Sequence[str]
    n_draws: int
    refit: bool
    unsettled: int = 0

    @property
    def n_simulations(self) -> int:
        """Number of tables."""
        return len(self.z)

    @cached_property
    def p_values(self) -> np.ndarray:
        """p-value of each quantity, that its ranks are uniform, (n_quantities,)."""
        uniform = uniform_gammas(self.n_simulations, self.n_draws)
        gammas = [gamma(self.counted(q), self.n_simulations)[0] for q in range(len(self.ranks.T))]
        return (1 + (uniform <= np.array(gammas)[:, None]).sum(1)) / (1 + len(uniform))

    @property
    def p_value(self) -> float:
        """p-value of all quantities together, the smallest times their number (Bonferroni)."""
        return float(min(1.0, len(self.p_values) * self.p_values.min()))

    def counted(self, quantity: int) -> np.ndarray:
        """Return how many ranks of a quantity are below k, for k = 1 ... n_draws, (1, n_draws)."""
        found = np.bincount(self.ranks[:, quantity], minlength=self.n_draws + 1)
        return found.cumsum()[None, :-1]

    def band(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return lowest and highest shares of ranks below k, for k = 1 ... n_draws.

        All of them stay in this band, at once, in `level` of all sets of uniform ranks.
        """
        n, K = self.n_simulations, self.n_draws + 1
        least = np.quantile(uniform_gammas(n, self.n_draws), 1 - level)
        share = np.arange(1, K) / K
        return binom.ppf(least / 2, n, share) / n, binom.isf(least / 2, n, share) / n

    def coverage(self, level: float, component: int | None = None) -> Coverage:
        """Return the share of log-factors in their central intervals of this level.

        Parameters
        ----------
        level : float
            Probability that an interval is meant to hold.
        component : int, optional
            One component; all of them unless given.
        """
        z = self.z if component is None else self.z[..., component]
        held = np.abs(z.reshape(len(z), -1)) < norm.ppf(0.5 + level / 2)
        spread = held.mean(1).std(ddof=1) / len(held) ** 0.5 if len(held) > 1 else np.inf
        least = (level * (1 - level) / held.size) ** 0.5
        return Coverage(float(held.mean()), float(max(spread, least)))

    def table(self) -> DataFrame | np.ndarray:
        """Return a row for each component, and one for all of them.

        Columns are the share of log-factors in intervals of 50, 80, 90 and 95%, the standard error
        of each, mean and standard deviation of z, and the p-value that ranks are uniform.
        """
        rows: list[dict[str, Any]] = []
        for l in (*range(self.z.shape[2]), None):
            row: dict[str, Any] = {"component": "all" if l is None else str(l)}
            for level in LEVELS:
                found = self.coverage(level, l)
                row[f"{level:.0%}"], row[f"se_{level:.0%}"] = found
            z = self.z if l is None else self.z[..., l]
            row |= {"mean_z": float(z.mean()), "sd_z": float(z.std())}
            row["p_value"] = self.p_value if l is None else float(self.p_values[l])
            rows.append(row)
        return as_table({name: [row[name] for row in rows] for name in rows[0]})

    @property
    def off(self) -> float:
        """By how much 90% intervals hold the truth too often (above 0) or too seldom.

        It is 0 where the tables cannot tell it from 0, and where it is at most two in a hundred.
        """
        share, error = self.coverage(0.9)
        away = share - 0.9
        told = t.isf(0.00135, self.n_simulations - 1) * error
        return away if abs(away) > max(told, TOLERATED) else 0.0

    @property
    def flagged(self) -> bool:
        """Whether intervals are off or ranks are not uniform, as far as so many tables tell."""
        enough = self.n_simulations >= FEWEST
        return enough and (self.off != 0 or self.p_value < FLAGGED)

    def verdict(self) -> str:
        """Say in words what was found, and what so many tables cannot show."""
        n, (share, error) = self.n_simulations, self.coverage(0.9)
        if n < FEWEST:
            return (
                f"{n} tables are too few to say anything. Calibrate again with n_simulations of "
                f"{FEWEST} or more, better 100."
            )
        what = "fits of" if self.refit else "posteriors, with the loadings known, of"
        said = (
            f"In {what} {n} simulated tables, 90% intervals of log-factors hold the truth in "
            f"{100 * share:.1f}% (standard error {100 * error:.1f})."
        )
        parts = [said, self._of_intervals(error), self._of_ranks()]
        if self.unsettled:
            parts.append(f"{self.unsettled} of {n} fits had not settled.")
        return " ".join(parts)

    def _of_intervals(self, error: float) -> str:
        if self.off < 0:
            return "They are too narrow: do not read them as 90% intervals."
        if self.off > 0:
            return "They are wider than they need to be."
        unseen = 100 * max(t.isf(0.00135, self.n_simulations - 1) * error, TOLERATED)
        return (
            f"That is not told from 90%. A share that is off by less than {unseen:.1f} in a "
            "hundred would not have been seen, or is good enough."
        )

    def _of_ranks(self) -> str:
        p = f"p = {self.p_value:.2g}"
        if self.p_value < FLAGGED:
            worst = self.quantities[int(self.p_values.argmin())]
            return f"Ranks are not uniform ({p}), those of {worst} least of all."
        low, high = self.band()
        unseen = float((high - low).max()) / 2
        return (
            f"Ranks are not told from uniform ones ({p}); with {self.n_simulations} ranks of each, "
            f"a distribution function that is off by less than {unseen:.2f} mostly is not."
        )


@isolated
def calibrate(
    model: Fitted,
    n_simulations: int = 50,
    *,
    refit: bool = False,
    random_state: RandomState = None,
    verbose: bool | int = False,
) -> Calibration:
    """Measure how often intervals hold the truth, in tables that the model makes.

    Log-factors are drawn from the prior of the model, with its hyperparameters, and counts given
    them and its loadings, as many and at the same places. It says whether the posterior is right
    where the model is; whether the model is right is for
    :func:`~pnmf_pyro.posterior_predictive_check`.

    Parameters
    ----------
    model : PNMF, ModelFit or PoissonFactorization
        Fit, see :func:`~pnmf_pyro.training.fitted.fitted_module`.
    n_simulations : int
        Number of tables. Each is inferred anew, in part of the time of a fit; or fitted.
    refit : bool
        Fit each table as a whole, as `model`, a PNMF, was fitted: loadings and hyperparameters are
        learned again. Components are matched with those of the model by their loadings, and the
        level of each, which factors and loadings share, is taken away: mean log-factors are
        compared with 0. Otherwise loadings and hyperparameters are taken for known.
    random_state : int, RandomState, Generator or None
        Seed of the tables and of all draws; None for different ones at each call.
    verbose : bool or int
        Whether a progress bar is shown.

    Returns
    -------
    Calibration

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> from pnmf_pyro.analysis.calibration import calibrate
    >>> X = np.random.default_rng(0).poisson(5, size=(30, 20))
    >>> model = pnmf_pyro.fit(X, n_components=2)
    >>> found = calibrate(model, 20, random_state=0)
    >>> 0.8 < found.coverage(0.9).share < 1
    True
    """
    module = fitted_module(model)
    check_count("n_simulations", n_simulations)
    check_flag("refit", refit)
    if refit and not isinstance(model, PNMF):
        raise ValueError(
            f"refit=True needs the fitted PNMF, which knows how to fit; got "
            f"{type(model).__name__}. Pass it, or leave refit out."
        )
    if refit and module.exposure.effects is not None:
        raise ValueError("refit must be False for a fit with effects of batches or covariates.")
    generator = torch_generator(random_state)
    found: list[_Found] = []
    with progress_bar(n_simulations, int(verbose), "tables") as progress:
        for _ in range(n_simulations):
            truth, counts = _simulated(module, generator)
            found.append(_compared(model, module, truth, counts, refit, generator))
            progress.update()
    names = [f"component {l}" for l in range(module.L)] + ["the log-likelihood"] * (not refit)
    z, ranks, unsettled = zip(*found, strict=True)
    return Calibration(np.stack(z), np.stack(ranks), names, DRAWS, refit, sum(unsettled))


class _Found(NamedTuple):
    """z of a table, (N, L), ranks of its quantities, and whether its fit had not settled."""

    z: np.ndarray
    ranks: np.ndarray
    unsettled: bool


def _simulated(module: PoissonFactorization, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw log-factors (L, N) from the prior and counts (N, D) given them."""
    program = poutine.condition(module.model, {"X": torch.zeros(())})
    rows = torch.arange(module.N, device=module.W.device)
    with module.apart(inherit=True), drawing_from(generator, module.W.device), torch.no_grad():
        latents = draw_latents(program, 1)
        if "F" not in latents.values:
            raise ValueError('model must have a sample statement "F" for its log-factors.')
        blocks = rows.split(at_once(module.D, BLOCK))
        counts = torch.cat([draw_counts(module, latents, block)[0] for block in blocks])
        F = latents.values["F"].reshape(module.L, module.N)
    return F, counts


def _compared(
    model: Fitted,
    module: PoissonFactorization,
    truth: Tensor,
    counts: Tensor,
    refit: bool,
    generator: torch.Generator,
) -> _Found:
    """Infer the log-factors of a simulated table, and say where the truth lies in the posterior."""
    order, unsettled = torch.arange(module.L), False
    if refit:
        assert isinstance(model, PNMF)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again = _fitted_again(model, counts)
        unsettled = any(issubclass(one.category, ConvergenceWarning) for one in said)
        order = torch.from_numpy(match_factors(model, again).permutation)
        inferred = again.model_
    else:
        inferred = infer_again(module, as_counts(counts), generator)
    field = posterior_of(inferred.prior)
    with torch.no_grad(), drawing_from(generator, module.W.device):
        draws = field.draws(DRAWS)(None)[:, order]
        tested = torch.randint(module.N, (module.L + 1,), generator=generator)
    q = field.marginal()
    loc, scale = q.loc.detach()[order], q.scale.detach()[order]
    if refit:
        truth, loc, draws = (F - F.mean(-1, keepdim=True) for F in (truth, loc, draws))
    z = ((truth - loc) / scale).T
    at = tested[:-1].to(truth.device)
    below = draws[:, range(module.L), at] < truth[range(module.L), at]
    ranks = below.sum(0)
    if not refit:
        told = [_log_likelihood(module, F, counts, int(tested[-1])) for F in (draws, truth[None])]
        ranks = torch.cat([ranks, (told[0] < told[1]).sum()[None]])
    return _Found(z.cpu().numpy(), ranks.cpu().numpy(), unsettled)


def _fitted_again(model: PNMF, counts: Tensor) -> PNMF:
    """Fit a table as a model was fitted, at its places and with its exposure."""
    module = model.model_
    places, exposure = module.prior.places, module.exposure
    where: dict[str, Any] = {}
    if places is not None and model.spatial:
        where["coordinates"] = places.coordinates.cpu().numpy()
        if places.groups is not None:
            where["groups"] = GroupCodes(model.groups_ or ()).decode(places.groups)
    if exposure.size_factors is not None:
        where["size_factors"] = exposure.size_factors.cpu().numpy()
    if exposure.hidden is not None:
        where["mask"] = exposure.hidden.numpy().toarray() == 0
    return clone(model).set_params(verbose=0).fit(counts.cpu().numpy(), **where)


def _log_likelihood(
    module: PoissonFactorization, draws: Tensor, counts: Tensor, sample: int
) -> Tensor:
    """Log-likelihood of the counts of a sample for draws of log-factors (E, L, N), (E,)."""
    index = torch.tensor([sample], device=draws.device)
    with module.apart(inherit=True), torch.no_grad():
        X: Any = module.likelihood(draws[..., index], Batch(samples=index))
        found = X.log_prob(counts[index].to(draws))
    return found.reshape(len(draws), -1).sum(1)
