r"""Posterior and prior predictive checks: whether the model makes tables like the data.

For a statistic T the check compares T(X) with its values for tables that the model makes, see
:mod:`~pnmf_pyro.analysis.replicates`. Where T has a number for each feature or sample, one p-value
for all of them comes from the mean of their squared z-scores. With t_k the values for table k,
k = 0 being the data, and means and standard deviations over all n + 1 tables,

.. math:: z_{kj} = \frac{t_{kj} - \bar t_j}{\mathrm{sd}(t_j)}, \qquad
    S_k = \frac{1}{m} \sum_j z_{kj}^2, \qquad
    p = \frac{\#\{k : S_k \ge S_0\}}{n + 1}.

If the data were one more table of the predictive distribution, the S_k would be exchangeable and p
would be below :math:`\alpha` with probability at most :math:`\alpha`, however the m values depend
on each other: many features make no multiple testing within a statistic.

The data are used twice, to fit and to check, which makes p conservative: more so the more directly
T is fitted. Totals are fitted almost exactly and can hardly ever fail; the shape of the
distribution of counts, zeros, maxima and correlations are not (Meng 1994; Robins, van der Vaart and
Ventura 2000; Bayarri and Berger 2000). S is one-sided on purpose: a two-sided test of the mean
z-score would turn the slight overfitting of the loadings into alarms. S sees overfitting only where
it is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from pnmf_pyro.analysis.remedies import FitFacts, meanings
from pnmf_pyro.analysis.replicates import replicated_counts
from pnmf_pyro.analysis.statistics import (
    Statistic,
    Wanted,
    chosen_statistics,
    places_of_samples,
)
from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.checks import check_count
from pnmf_pyro.data.counts import CountsLike
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.masks import unmasked, without
from pnmf_pyro.data.random_state import RandomState
from pnmf_pyro.estimator.inputs import keys_of
from pnmf_pyro.estimator.results import counts_of_fit, sample_names
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.training.fitted import Fitted, fitted_module
from pnmf_pyro.training.loop import progress_bar

if TYPE_CHECKING:
    from pandas import DataFrame

# p-value below which a statistic is reported as misfit.
FLAGGED = 0.01

# Mean z-score, over their quadratic mean, below which z-scores have no side that words could name.
ONE_SIDED = 0.1


@dataclass(frozen=True)
class StatisticCheck:
    """One statistic of the data beside its values for replicated tables.

    Attributes
    ----------
    statistic : Statistic
        Statistic that was compared.
    labels : sequence of length m
        Names of its numbers.
    observed : ndarray of shape (m,)
        Values for the data.
    replicated : ndarray of shape (n_draws, m), float32
        Values for the replicated tables.
    """

    statistic: Statistic
    labels: Sequence
    observed: np.ndarray
    replicated: np.ndarray

    @cached_property
    def _tables(self) -> np.ndarray:
        """Values of the data and of the replicated tables, one below another."""
        return np.vstack([self.observed.astype(self.replicated.dtype), self.replicated])

    @cached_property
    def z(self) -> np.ndarray:
        """z-score of each number, (m,): its distance from the replicated mean in their sd.

        Where all replicated tables have the same number, the sd is that with the data among them.
        """
        away = self._tables[0] - self.replicated.mean(0, dtype=np.float64)
        spread = self.replicated.std(0, dtype=np.float64)
        spread = np.where(spread > 0, spread, self._tables.std(0, dtype=np.float64))
        return np.divide(away, spread, out=np.zeros_like(away), where=spread > 0)

    @cached_property
    def p_value(self) -> float:
        """Probability of replicated tables as far from what the model expects as the data are."""
        spread = self._tables.std(0, dtype=np.float64)
        z = self._tables - self._tables.mean(0, dtype=np.float64)
        np.divide(z, spread, out=z, where=spread > 0)
        S = np.mean(z**2, axis=1)
        return float(np.mean(S[0] <= S))

    @property
    def p_values(self) -> np.ndarray:
        """Two-sided posterior predictive p-value of each number, shape (m,)."""
        seen = self.observed.astype(self.replicated.dtype)
        n = len(self.replicated)
        above = (1 + (self.replicated >= seen).sum(0)) / (1 + n)
        below = (1 + (self.replicated <= seen).sum(0)) / (1 + n)
        return np.minimum(1, 2 * np.minimum(above, below))

    @property
    def row(self) -> dict[str, Any]:
        """What the table of a check says of this statistic."""
        mean = self.replicated.mean(1, dtype=np.float64)
        low, high = np.quantile(mean, (0.05, 0.95))
        return {
            "statistic": self.statistic.name,
            "of": self.statistic.of,
            "observed": float(self.observed.mean()),
            "replicated": float(mean.mean()),
            "replicated_5%": float(low),
            "replicated_95%": float(high),
            "mean_z": float(self.z.mean()),
            "share_below_0.05": float(np.mean(self.p_values < 0.05)),
            "p_value": self.p_value,
        }

    @property
    def sentence(self) -> str:
        """What the check found, in words."""
        s, row = self.statistic, self.row
        higher, away = row["mean_z"] > 0, row["observed"] - row["replicated"]
        one_sided = abs(row["mean_z"]) >= ONE_SIDED * np.sqrt(np.mean(self.z**2))
        if not one_sided or away * row["mean_z"] <= 0:
            found = "too high in the data for some and too low for others"
            meaning = s.mixed or f"the model does not follow it from one {s.of} to another"
        else:
            found = (
                f"{'higher' if higher else 'lower'} in the data, on average "
                f"{_told_apart(row['observed'], row['replicated'])}"
            )
            meaning = (s.above if higher else s.below) or "the model does not reproduce it"
        return f"{s.name} of each {s.of}: {found} (p = {self.p_value:.3g}): {meaning}."


def _told_apart(a: float, b: float) -> str:
    """Two numbers that differ, with as many digits as show it."""
    for digits in range(3, 17):
        if f"{a:.{digits}g}" != f"{b:.{digits}g}":
            break
    return f"{a:.{digits}g} against {b:.{digits}g}"


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of the data beside those of tables that the model makes.

    Attributes
    ----------
    results : list of StatisticCheck
        Result for each statistic.
    n_draws : int
        Number of replicated tables.
    kind : {'posterior', 'prior'}
        Distribution of the replicated tables.
    """

    results: list[StatisticCheck]
    n_draws: int
    kind: str

    def __getitem__(self, name: str | tuple[str, str]) -> StatisticCheck:
        """Return the result for a statistic, by name or by (name, of)."""
        known = [(one.statistic.name, one.statistic.of) for one in self.results]
        for one, (short, of) in zip(self.results, known, strict=True):
            if name in (short, (short, of)):
                return one
        raise KeyError(f"there is no statistic {name!r} in this check, which has {known}")

    def table(self, of: str | None = None) -> DataFrame | np.ndarray:
        """Return a table of the results.

        Parameters
        ----------
        of : str, optional
            "feature", "sample" or another `of` of the statistics: a row for each of these, with
            observed values, replicated means and p-values. A row for each statistic unless given.

        Returns
        -------
        DataFrame, or a structured array where pandas is not installed
        """
        if of is None:
            rows = [one.row for one in self.results]
            return as_table({name: [row[name] for row in rows] for name in rows[0]})
        chosen = [one for one in self.results if one.statistic.of == of]
        if not chosen:
            known = sorted({one.statistic.of for one in self.results})
            raise ValueError(f"of must be one of {known}, or None; got {of!r}.")
        columns: dict[str, Any] = {of: list(chosen[0].labels)}
        for one in chosen:
            name = one.statistic.name
            columns[name] = one.observed
            columns[f"{name}_replicated"] = one.replicated.mean(0, dtype=np.float64)
            columns[f"{name}_p_value"] = one.p_values
        return as_table(columns)

    @property
    def flagged(self) -> list[StatisticCheck]:
        """The statistics that the model does not reproduce, the smallest p-value first."""
        found = [one for one in self.results if one.p_value < FLAGGED]
        return sorted(found, key=lambda one: one.p_value)

    def verdict(self) -> str:
        """Say in words what the model misses."""
        flagged, smallest = self.flagged, 1 / (self.n_draws + 1)
        if smallest >= FLAGGED:
            return (
                f"{self.n_draws} tables are too few to say anything: the smallest p-value of so "
                f"many is {smallest:.2g}, and p < {FLAGGED} is reported. Check again with n_draws "
                f"of {round(1 / FLAGGED)} or more."
            )
        if not flagged:
            return (
                f"None of the {len(self.results)} statistics tells the data from {self.n_draws} "
                f"tables of the {self.kind} predictive distribution (all p >= {FLAGGED}). That is "
                "no proof of the model: it says that these statistics see nothing wrong."
            )
        common = "; one cause can move several" if len(flagged) > 1 else ""
        lines = [f"- {one.sentence}" for one in flagged]
        if flagged[0].p_value <= smallest:
            lines.append(f"p = {smallest:.3g} is the smallest that {self.n_draws} tables can show.")
        return (
            f"The model does not reproduce {len(flagged)} of {len(self.results)} statistics "
            f"(p < {FLAGGED}, {self.n_draws} tables of the {self.kind} predictive "
            f"distribution){common}:\n" + "\n".join(lines)
        )


def posterior_predictive_check(
    model: Fitted,
    X: CountsLike,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    statistics: Wanted = None,
    n_draws: int = 200,
    *,
    random_state: RandomState = None,
    verbose: bool | int = False,
) -> PredictiveCheck:
    """Compare the data with tables that the fitted model makes.

    Parameters
    ----------
    model : PNMF, ModelFit or PoissonFactorization
        Fit of X, see :func:`~pnmf_pyro.training.fitted.fitted_module`.
    X : array-like or sparse matrix of shape (N, D)
        Counts of the fit.
    coordinates : array-like of shape (N, p), optional
        Places of the samples, for Moran's I; those of a spatial model unless given.
    groups : array-like of shape (N,), optional
        Groups, across which there are no neighbours; those of a multi-group model unless given.
    statistics : sequence, optional
        Names among 'total', 'variance_to_mean', 'zero_fraction', 'maximum' (each of samples and of
        features), 'correlation' (of pairs among the 50 most abundant features) and 'moran';
        functions of a table, an ndarray or csr_array of shape (N, D) like X, to a number or an
        array; or a :class:`~pnmf_pyro.analysis.statistics.Statistic`. All the names that apply
        unless given.
    n_draws : int
        Number of replicated tables. The smallest p-value is 1 / (n_draws + 1).
    random_state : int, RandomState, Generator or None
        Seed of the replicated tables; None for different ones at each call.
    verbose : bool or int
        Whether a progress bar is shown.

    Returns
    -------
    PredictiveCheck

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> X = np.random.default_rng(0).negative_binomial(1, 0.1, size=(100, 20))
    >>> model = pnmf_pyro.fit(X, n_components=2)
    >>> check = pnmf_pyro.posterior_predictive_check(model, X, n_draws=100, random_state=0)
    >>> check["variance_to_mean"].p_value < 0.01
    True
    """
    where = coordinates, groups
    return _check("posterior", model, X, where, statistics, n_draws, random_state, verbose)


def prior_predictive_check(
    model: Fitted,
    X: CountsLike,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    statistics: Wanted = None,
    n_draws: int = 200,
    *,
    random_state: RandomState = None,
    verbose: bool | int = False,
) -> PredictiveCheck:
    """Compare the data with tables made from the prior of the factors and the model's loadings.

    It shows what the prior takes for possible. The loadings have no prior: they are those that the
    model holds, and the scales of a prior that learns its own are learned from the data too. So a
    wide distribution of the replicated statistics is no fault, and data far outside of it are.

    Parameters
    ----------
    model, X, coordinates, groups, statistics, n_draws, random_state, verbose
        As for :func:`posterior_predictive_check`; a PoissonFactorization need not be trained.

    Returns
    -------
    PredictiveCheck
    """
    where = coordinates, groups
    return _check("prior", model, X, where, statistics, n_draws, random_state, verbose)


@isolated
def _check(
    kind: str,
    model: Fitted,
    X: CountsLike,
    where: tuple[ArrayLike | None, ArrayLike | None],
    statistics: Wanted,
    n_draws: int,
    random_state: RandomState,
    verbose: bool | int,
) -> PredictiveCheck:
    """Work out the statistics of the data and of replicates, in one pass over these."""
    check_count("n_draws", n_draws)
    module = fitted_module(model)
    keys = keys_of(model)
    samples = sample_names(X, module.N)
    counts = counts_of_fit(_as_observed(keys.counts(X), module), (module.N, module.D)).numpy()
    sparse = sp.issparse(counts)
    table = sp.csr_array(counts) if sparse else counts
    places = module.prior.places
    if places is None:
        where = keys.where(X, *where)
    if any(given is not None for given in where):
        places = places_of_samples(*where, module.N)
    names: dict[str, Sequence] = {
        "sample": samples,
        "feature": list(getattr(model, "feature_names_in_", range(module.D))),
    }
    told = partial(meanings, fit=FitFacts.of(module))
    chosen = chosen_statistics(statistics, table, places, names["feature"], told)
    observed = [_finite(one, one(table), "the data") for one in chosen]
    replicated = [np.empty((n_draws, len(values)), np.float32) for values in observed]
    tables = replicated_counts(
        model, n_draws, prior=kind == "prior", sparse=sparse, random_state=random_state
    )
    with progress_bar(n_draws, int(verbose), f"{kind} predictive") as progress:
        for draw, replicate in enumerate(tables):
            for one, values in zip(chosen, replicated, strict=True):
                values[draw] = _finite(one, one(replicate), "a replicated table")
            progress.update()
    results = [
        StatisticCheck(one, one.labels or names.get(one.of) or range(len(seen)), seen, values)
        for one, seen, values in zip(chosen, observed, replicated, strict=True)
    ]
    return PredictiveCheck(results, n_draws, kind)


def _as_observed(X: CountsLike, module: PoissonFactorization) -> CountsLike:
    """Return a table with zeros where the fit had hidden entries; no other may be masked."""
    hidden = module.exposure.hidden
    X, seen = unmasked(X, None)
    known = True if hidden is None else hidden.numpy().toarray() == 0
    if seen is not None and (known & ~np.asarray(seen)).any():
        raise ValueError("X has masked entries that the fit observed; pass the X of the fit.")
    return without(X, hidden)


def _finite(statistic: Statistic, values: np.ndarray, table: str) -> np.ndarray:
    """Return the values of a statistic, which must be numbers that can be compared."""
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(
            f"statistics: {statistic.name!r} of {table} is NaN or infinite for {bad} of "
            f"{len(values)} ({statistic.of}), and such numbers cannot be compared. Let it return "
            "a finite number there too, such as 0 for a sample or feature without counts."
        )
    return values
