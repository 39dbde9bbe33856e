"""How many components: prediction of held-out counts, and stability, over a range of numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.analysis.hold_out import HOLD_OUT, Split
from pnmf_pyro.analysis.matching import match_factors
from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.checks import check_choice, check_count, check_counts, check_size_factors
from pnmf_pyro.data.counts import CountsLike
from pnmf_pyro.data.design import Covariates, Labels, from_obs
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.masks import Mask, hide
from pnmf_pyro.data.random_state import RandomState, check_random_state
from pnmf_pyro.data.tables import check_order
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys
from pnmf_pyro.estimator.fit import fit
from pnmf_pyro.estimator.inputs import Scales
from pnmf_pyro.training.loop import progress_bar
from pnmf_pyro.transforms import get_factors, get_loadings

if TYPE_CHECKING:
    from pandas import DataFrame

# Steps without noise: they settle soon, and only predictions are compared.
FAST: dict[str, Any] = {"mode": "lower-bound"}

# Parameters of `fit` that say what to read of an AnnData object.
READ = {"layer", "spatial_key", "batch_key"}

CAVEATS = (
    "The curve says how many components can be told from noise with this many counts of these "
    "samples. It does not say how many processes there are: more counts usually support more "
    "components, and where the curve is flat the data leave the number open; then choose by "
    "stability and by what the components mean."
)


@dataclass(frozen=True)
class ComponentSelection:
    """Held-out deviance and stability for each number of components.

    Attributes
    ----------
    n_components : list of int
        Numbers tried, rising.
    deviance : ndarray of shape (n_tried, n_seeds)
        Mean Poisson deviance of held-out counts, for each split of the data.
    stability : ndarray of shape (n_tried, n_pairs)
        Mean cosine of matched components, for each pair of splits.
    hold_out : {'thinning', 'entries'}
        What was held out.
    """

    n_components: list[int]
    deviance: np.ndarray
    stability: np.ndarray
    hold_out: str = "thinning"

    @property
    def mean_deviance(self) -> np.ndarray:
        """Mean over splits of the held-out deviance, (n_tried,)."""
        return self.deviance.mean(1)

    @property
    def excess(self) -> np.ndarray:
        """Mean held-out deviance above that of the best number, (n_tried,)."""
        return self.mean_deviance - self.mean_deviance.min()

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of `excess` over splits, (n_tried,); 0 for the best number itself.

        The difference is taken within each split, whose counts are as hard to predict for all.
        """
        above = self.deviance - self.deviance[np.argmin(self.mean_deviance)]
        return above.std(1, ddof=1) / np.sqrt(self.deviance.shape[1])

    @property
    def best(self) -> int:
        """Number of components with the lowest mean held-out deviance."""
        return self.n_components[int(np.argmin(self.mean_deviance))]

    @property
    def chosen(self) -> int:
        """Smallest number whose mean deviance is within one standard error of the lowest.

        The rule of Breiman, Friedman, Olshen and Stone (1984, section 3.4.3), for the difference.
        """
        return self.n_components[int(np.argmax(self.excess <= self.standard_error))]

    @property
    def beyond(self) -> str | None:
        """`fewer` or `more`: what is left to try where the chosen number ends the range."""
        first, last = self.n_components[0], self.n_components[-1]
        if first < last == self.chosen:
            return "more"
        return "fewer" if 1 < self.chosen == first < last else None

    @property
    def columns(self) -> dict[str, list | np.ndarray]:
        """Columns of :meth:`table` by name, with a row for each number of components."""
        return {
            "n_components": list(self.n_components),
            "deviance": self.mean_deviance,
            "excess": self.excess,
            "standard_error": self.standard_error,
            "stability": self.stability.mean(1),
            "chosen": [number == self.chosen for number in self.n_components],
        }

    def table(self) -> DataFrame | np.ndarray:
        """Return `columns` as a DataFrame; a structured array where pandas is not installed."""
        return as_table(self.columns)

    def summary(self) -> str:
        """Say in words what was found, and what it does and does not tell."""
        position, how = self.n_components.index(self.chosen), HOLD_OUT[self.hold_out]
        parts = [
            f"Held-out counts are predicted best with {self.best} components; {self.chosen} is the "
            "smallest number within one standard error of that.",
            f"With {self.chosen}, components of different {how.called} match with a mean "
            f"cosine of {self.stability[position].mean():.2f} (1: the same components each time).",
        ]
        if self.beyond:
            parts.append(f"This is the end of the range: try {self.beyond} components as well.")
        return f"{' '.join(parts)}\n{CAVEATS} {how.caveat}"


def select_n_components(
    X: CountsLike,
    n_components: Iterable[int] = range(2, 13),
    *,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    size_factors: ArrayLike | None = None,
    batches: Labels = None,
    covariates: Covariates = None,
    mask: Mask = None,
    hold_out: str = "thinning",
    n_seeds: int = 5,
    train_fraction: float | None = None,
    n_jobs: int | None = None,
    random_state: RandomState = None,
    checkpoint: str | os.PathLike | None = None,
    verbose: bool | int = False,
    **parameters: Any,
) -> ComponentSelection:
    r"""Compare numbers of components by how well they predict counts that were held out.

    By `thinning` each count is split in two: where X is Poisson with rates mu, the parts are
    independent Poisson tables with rates f mu and (1 - f) mu, f being `train_fraction`. So a model
    of the first predicts the second without having seen any of it (Neufeld, Gao, Popp, Battle and
    Witten 2024). By `entries` the fit sees a random share f of the entries of X, and predicts the
    others from the factors of their samples and the loadings of their features. That needs no
    Poisson counts, but entries that are independent given the rates. Several splits give a standard
    error and a stability.

    Parameters
    ----------
    X : array-like or sparse matrix of shape (n_samples, n_features)
        Raw counts, whole numbers. Sparse input stays sparse.
    n_components : iterable of int
        Numbers to try.
    coordinates, groups, size_factors : array-like, optional
        Places, groups and size factors of the samples, as for :func:`~pnmf_pyro.fit`.
    batches, covariates : array-like, str or list of str, optional
        What has effects on features, as for :func:`~pnmf_pyro.fit`.
    mask : array-like or sparse matrix of shape (n_samples, n_features), optional
        True where an entry is observed; what is hidden is neither fitted nor predicted.
    hold_out : {'thinning', 'entries'}
        What the fits do not see: a part of each count, or some of the entries.
    n_seeds : int
        Number of splits, at least 2; each has a seed of its own for the fits as well.
    train_fraction : float in (0, 1), optional
        Share of the counts, or of the entries, to fit to; 0.5 and 0.9 unless given.
    n_jobs : int, optional
        Number of processes that fit at the same time; -1 for all cores, 1 unless given.
    random_state : int, RandomState, Generator or None
        Seed of the splits and the fits; None for different ones at each call.
    checkpoint : str or os.PathLike, optional
        Folder in which each fit is kept in a file of its own. The same call goes on from there, to
        the same numbers as if never stopped. It needs a whole number as `random_state`.
    verbose : bool or int
        Whether a progress bar is shown.
    **parameters
        Parameters of :func:`~pnmf_pyro.fit`, in place of its own and mode="lower-bound".

    Returns
    -------
    ComponentSelection

    Examples
    --------
    >>> import numpy as np
    >>> from pnmf_pyro import select_n_components
    >>> random = np.random.default_rng(0)
    >>> F = random.normal(size=(100, 2))
    >>> X = random.poisson(np.exp(F) @ random.gamma(0.3, 10, size=(2, 30)))
    >>> selection = select_n_components(X, range(1, 5), n_seeds=2, random_state=0)
    >>> selection.chosen
    2
    """
    from joblib import Parallel, delayed

    sides = Scales(size_factors, mask, batches, covariates)._asdict()
    check_order(X, coordinates=coordinates, groups=groups, **sides)
    beside = dict(zip(("batches", "covariates"), from_obs(X, batches, covariates), strict=True))
    keys = AnnDataKeys(**{key: parameters.pop(key) for key in READ & parameters.keys()})
    X, coordinates, groups = keys.take_apart(X, coordinates, groups, parameters.get("spatial"))
    X, hidden = hide(X, mask)
    counts = check_counts(X)
    sizes = check_size_factors(size_factors, counts)
    numbers = _checked_numbers(n_components, max(counts.shape))
    if check_count("n_seeds", n_seeds) < 2:
        raise ValueError("n_seeds must be at least 2, for a standard error; got 1.")
    fraction = _checked_fraction(hold_out, train_fraction)
    random = check_random_state(random_state)
    seeds = [int(seed) for seed in random.randint(2**31 - 1, size=n_seeds)]
    given = {"coords": coordinates, "groups": groups} | beside | FAST | parameters
    s = None if sizes is None else sizes.numpy()
    seen = None if hidden is None else hidden.numpy().toarray() == 0
    split = partial(HOLD_OUT[hold_out].split, counts.numpy(), seen, fraction)
    pairs = [(number, seed) for number in numbers for seed in seeds]
    each = zip(pairs, _files(checkpoint, random_state, pairs), strict=True)
    tasks = [delayed(_trial)(split, s, given | file, *pair) for pair, file in each]
    found = []
    with progress_bar(len(tasks), int(verbose), "fits") as progress:
        for result in Parallel(n_jobs=n_jobs, return_as="generator")(tasks):
            found.append(result)
            progress.update()
    by_number = [found[start : start + n_seeds] for start in range(0, len(found), n_seeds)]
    return _compared(numbers, by_number, hold_out)


def _compared(
    numbers: list[int], by_number: list[list[tuple[float, np.ndarray]]], hold_out: str
) -> ComponentSelection:
    """Return what the deviances and loadings of the fits of each number of components say."""
    paired = [combinations([W for _, W in results], 2) for results in by_number]
    deviances = np.array([[deviance for deviance, _ in results] for results in by_number])
    alike = np.array([[match_factors(a, b).similarity for a, b in pairs] for pairs in paired])
    return ComponentSelection(numbers, deviances, alike, hold_out)


def _checked_fraction(hold_out: str, train_fraction: float | None) -> float:
    """Share of the counts, or of the entries, to fit to."""
    check_choice("hold_out", hold_out, tuple(HOLD_OUT))
    fraction = HOLD_OUT[hold_out].fraction if train_fraction is None else train_fraction
    if not isinstance(fraction, Real) or not 0 < fraction < 1:
        raise ValueError(f"train_fraction must be between 0 and 1; got {train_fraction!r}.")
    return float(fraction)


def _files(
    folder: str | os.PathLike | None, random_state: RandomState, pairs: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Return the parameter that names the checkpoint of each fit, by its number and its seed."""
    if folder is None:
        return [{} for _ in pairs]
    if not isinstance(random_state, int | np.integer):
        raise ValueError(
            "checkpoint needs a seed, by which the files of the fits are known: set random_state "
            f"to a whole number. It is {random_state!r}."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [{"checkpoint": Path(folder) / f"{l}_components_seed_{seed}.ckpt"} for l, seed in pairs]


@isolated
def _trial(
    split: Callable[[np.random.RandomState], Split],
    size_factors: np.ndarray | None,
    parameters: dict[str, Any],
    number: int,
    seed: int,
) -> tuple[float, np.ndarray]:
    """Fit one part of the counts, predict the other: held-out deviance and loadings (D, L)."""
    parts = split(np.random.RandomState(seed))
    seen = np.flatnonzero(np.asarray(parts.train.sum(0)).ravel() > 0)
    if not len(seen):
        raise ValueError(
            "X has too few counts to hold some out: none is left to fit. Use a larger "
            "train_fraction."
        )
    loadings, parts = np.zeros((parts.train.shape[1], number)), parts.of_features(seen)
    given = {"size_factors": size_factors, "random_state": seed, **parameters}
    model = fit(parts.train, n_components=number, mask=parts.seen, **given)
    factors, W = np.asarray(get_factors(model)), np.asarray(get_loadings(model))
    if size_factors is not None:
        factors = factors * size_factors[:, None].astype(factors.dtype)
    loadings[seen] = W
    return parts.deviance(factors, W, model.model_.exposure), loadings


def _checked_numbers(n_components: Iterable[int], largest: int) -> list[int]:
    try:
        numbers = sorted({check_count("n_components", number) for number in n_components})
    except TypeError as error:
        raise ValueError(
            "n_components must be several whole numbers, such as range(2, 13); got "
            f"{n_components!r}."
        ) from error
    if not numbers or numbers[-1] > largest:
        raise ValueError(
            f"n_components must be numbers from 1 to {largest}, the larger side of X; got "
            f"{numbers}."
        )
    return numbers
