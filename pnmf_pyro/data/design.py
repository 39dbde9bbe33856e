"""Batches and covariates of samples as columns of a design, by one rule for a fit and for others.

A batch is a column that is 1 for its samples. A covariate that is a number is a column with its
mean over the samples of the fit subtracted, and divided by its standard deviation. One that is a
word has such a column for each of its categories but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pnmf_pyro.data.checks import check_array, some_of, warn
from pnmf_pyro.data.places import _is_missing, _plain_label
from pnmf_pyro.data.tables import is_anndata, refuse_masked

# Labels of batches, one for each sample; or the name of a column of obs of an AnnData object.
Labels = ArrayLike | str | None

# Numbers (N,) or (N, P), a data frame of these and words; or names of columns of obs.
Covariates = ArrayLike | str | Sequence[str] | None

# Part of a covariate that others leave unexplained, below which it says nothing of its own.
COLLINEAR = 1e-5


class Column(NamedTuple):
    """A column of a design that is made of a covariate.

    Attributes
    ----------
    covariate : str
        Name of the covariate.
    category : Hashable or None
        The word for which the column is 1, of a covariate of words.
    mean, scale : float
        What is subtracted, and what the rest is divided by.
    """

    covariate: str
    category: Hashable
    mean: float
    scale: float

    @property
    def name(self) -> str:
        """Name of the effect of the column."""
        word = "" if self.category is None else f"[{self.category}]"
        return f"{self.covariate}{word}"


class Design(NamedTuple):
    """What the batches and covariates of a fit are called, and how they become columns.

    Attributes
    ----------
    batches : tuple
        Labels of the batches in sorted order; none for a fit without batches.
    column : str or None
        Name of the column that the batches came from, where it has one.
    covariates : tuple of str
        Names of the covariates, in their order.
    columns : tuple of Column
        Columns that are made of them.
    levels : dict
        All categories of a covariate of words, by its name.
    """

    batches: tuple[Hashable, ...]
    column: str | None
    covariates: tuple[str, ...]
    columns: tuple[Column, ...]
    levels: dict[str, tuple[Hashable, ...]]

    @property
    def P(self) -> int:
        """Number of columns."""
        return len(self.batches) + len(self.columns)

    def plain(self, label: Callable[[Hashable], Any]) -> dict[str, Any]:
        """Return the design as values that JSON holds, given what it holds for a label."""
        words = {name: [label(one) for one in known] for name, known in self.levels.items()}
        columns = [[one.covariate, label(one.category), *one[2:]] for one in self.columns]
        batches = [label(one) for one in self.batches]
        return {**self._asdict(), "batches": batches, "columns": columns, "levels": words}

    @classmethod
    def of_plain(cls, plain: dict[str, Any], label: Callable[[Any], Hashable]) -> Design:
        """Return the design of which :meth:`plain` made values."""
        columns = [
            Column(str(name), label(word), float(mean), float(scale))
            for name, word, mean, scale in plain["columns"]
        ]
        if not all(np.isfinite(one[2:]).all() and one.scale > 0 for one in columns):
            raise ValueError("covariates have no finite mean and positive scale")
        words = {
            str(name): tuple(label(one) for one in known) for name, known in plain["levels"].items()
        }
        batches, covariates = tuple(map(label, plain["batches"])), tuple(plain["covariates"])
        return cls(batches, plain["column"], covariates, tuple(columns), words)

    @classmethod
    def of(cls, batches: Any, covariates: Any, n: int) -> tuple[Design, np.ndarray] | None:
        """Return the design of n samples of a fit, and its rows (n, P); None without any.

        What cannot be told apart, or is no batch or covariate, is a ValueError.
        """
        if batches is None and covariates is None:
            return None
        labels = None if batches is None else _labels("batches", batches, n)
        names = () if labels is None else _sorted(labels)
        if labels is not None:
            _check_members(names, labels)
        sources = {} if covariates is None else _sources(covariates, n)
        columns, levels = _columns_of(sources)
        column = getattr(batches, "name", None)
        found = cls(names, column if isinstance(column, str) else None, (), columns, levels)
        found = found._replace(covariates=tuple(sources))
        rows = found._rows(labels, sources, n)
        _check_collinear(rows, found)
        return found, rows

    def rows(self, batches: Any, covariates: Any, n: int) -> np.ndarray:
        """Return the rows (n, P) of n new samples; what is missing or unknown is a ValueError."""
        for name, given, wanted in (
            ("batches", batches, self.batches),
            ("covariates", covariates, self.covariates),
        ):
            if wanted and given is None:
                raise ValueError(
                    f"{name} must be given: the model was fitted with {name}, {some_of(wanted)}. "
                    f"Pass those of these samples as {name}=; got None."
                )
            if given is not None and not wanted:
                raise ValueError(
                    f"{name} are for models that were fitted with {name}, and this one was not. "
                    f"Leave {name} out, or fit again with {name}=."
                )
        labels = _labels("batches", batches, n) if self.batches else None
        if labels is not None and (unknown := set(labels) - set(self.batches)):
            raise ValueError(
                f"batches must be among those of the fit, {some_of(self.batches)}; got "
                f"{some_of(_sorted(unknown))}. The model knows no effect of other batches: fit it "
                "again with samples of them, or give new samples the batch that they are most like."
            )
        sources = _sources(covariates, n, self.covariates) if self.covariates else {}
        if set(sources) != set(self.covariates):
            raise ValueError(
                f"covariates must be those of the fit, {list(self.covariates)}; got "
                f"{list(sources)}. Pass them in a table of the same columns."
            )
        return self._rows(labels, sources, n)

    def _rows(self, labels: list | None, sources: dict[str, Any], n: int) -> np.ndarray:
        rows = np.zeros((n, self.P))
        if labels is not None:
            code = {name: number for number, name in enumerate(self.batches)}
            rows[np.arange(n), [code[label] for label in labels]] = 1
        for number, column in enumerate(self.columns, len(self.batches)):
            values = sources[column.covariate]
            levels = self.levels.get(column.covariate)
            if (levels is None) != isinstance(values, np.ndarray):
                kind = "numbers" if levels is None else "words"
                raise ValueError(
                    f"covariates: {column.covariate!r} must hold {kind}, as in the fit."
                )
            if levels is not None:
                if unknown := set(values) - set(levels):
                    raise ValueError(
                        f"covariates: {column.covariate!r} must be among those of the fit, "
                        f"{some_of(levels)}; got {some_of(_sorted(unknown))}. Fit the model again "
                        "with samples of them."
                    )
                values = np.array([value == column.category for value in values], dtype=float)
            rows[:, number] = (values - column.mean) / column.scale
        return rows


NO_DESIGN = Design((), None, (), (), {})


def from_obs(X: Any, batches: Any, covariates: Any, design: Design | None = None) -> tuple:
    """Return batches and covariates, of columns of obs where they are named.

    Those of an AnnData object of new samples are where the fit had them, unless given.
    """
    if is_anndata(X):
        if design is not None and batches is None and design.column in X.obs:
            batches = design.column
        if design is not None and covariates is None and design.covariates:
            named = all(name in X.obs for name in design.covariates)
            covariates = list(design.covariates) if named else None
        return _obs(X, "batches", batches), _obs(X, "covariates", covariates)
    for name, given in (("batches", batches), ("covariates", covariates)):
        if isinstance(given, str):
            raise ValueError(
                f"{name}={given!r} names a column of obs of an AnnData object, and X is none. Pass "
                "one value for each sample."
            )
    return batches, covariates


def _obs(adata: Any, name: str, given: Any) -> Any:
    """Return the column, or columns, of obs that are named."""
    several = isinstance(given, list | tuple) and all(isinstance(one, str) for one in given)
    if name == "batches" and several:
        return given  # labels
    if not isinstance(given, str) and not several:
        return given
    columns = list(given) if several else [given]
    if missing := [one for one in columns if one not in adata.obs]:
        raise ValueError(
            f"{name}: {some_of(missing)} is no column of adata.obs, which has {list(adata.obs)}."
        )
    return adata.obs[given] if name == "batches" else adata.obs[columns]


def as_design(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of a design, (G, P), and the number of that of each sample."""
    distinct, codes = np.unique(rows, axis=0, return_inverse=True)
    return torch.from_numpy(distinct), torch.from_numpy(codes.reshape(-1))


def _sorted(labels: Any) -> tuple[Hashable, ...]:
    return tuple(sorted(set(labels), key=lambda one: (str(type(one)), one)))


def _labels(name: str, values: Any, n: int) -> list[Hashable]:
    """Return a label for each sample; a ValueError where one is missing."""
    refuse_masked(name, values)
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    found = np.asarray(values, dtype=object)
    if found.shape != (n,):
        raise ValueError(
            f"{name} must have one label for each of the {n} samples, shape ({n},); got shape "
            f"{found.shape}."
        )
    missing = [number for number, one in enumerate(found) if _is_missing(one)]
    if missing:
        raise ValueError(
            f"{name} must not be missing (None, NaN or NA); {len(missing)} samples have none, the "
            f"first is sample {missing[0]}. Give each sample a label, such as 'unknown'."
        )
    return [_plain_label(one) for one in found]


def _check_members(names: Sequence[Hashable], labels: Sequence[Hashable]) -> None:
    """Refuse a single batch, and warn of batches of one sample."""
    if len(names) < 2:
        raise ValueError(
            f"batches must have two labels or more, to be told apart; all samples are in "
            f"{names[0]!r}. Leave batches out."
        )
    single = [name for name in names if labels.count(name) == 1] if len(names) > 1 else []
    if single:
        warn(
            f"batches: {some_of(single)} has one sample. Effects of such a batch follow the counts "
            "of that sample, whose factors are then unknown; give it to another batch, or leave it "
            "out."
        )


def _sources(covariates: Any, n: int, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the covariates by name: arrays of numbers, or lists of words.

    Those of an array without names have these `names`, where there are as many.
    """
    if hasattr(covariates, "to_frame"):  # a Series
        covariates = covariates.to_frame(covariates.name or "covariate")
    if isinstance(covariates, Mapping):
        columns = {str(name): column for name, column in covariates.items()}
    elif hasattr(covariates, "iloc"):
        columns = {str(name): covariates[name] for name in covariates.columns}
        if len(columns) < covariates.shape[1]:
            raise ValueError("covariates has columns of one name. Name each covariate once.")
    else:
        columns = _unnamed(covariates)
        if len(names) == len(columns):
            columns = dict(zip(names, columns.values(), strict=True))
    if not columns:
        raise ValueError("covariates must have at least one column; got none. Leave them out.")
    return {name: _values(name, column, n) for name, column in columns.items()}


def _unnamed(covariates: Any) -> dict[str, Any]:
    refuse_masked("covariates", covariates)
    values = np.asarray(covariates) if not isinstance(covariates, Tensor) else covariates
    if not isinstance(values, Tensor) and values.dtype.kind in "OUS" and values.ndim == 1:
        return {"covariate": values}
    table = check_array("covariates", values).astype(np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2:
        raise ValueError(
            "covariates must be numbers of shape (n_samples, P) or a data frame; got shape "
            f"{table.shape}."
        )
    return {f"covariate {number}": table[:, number] for number in range(table.shape[1])}


def _values(name: str, column: Any, n: int) -> np.ndarray | list[Hashable]:
    """Return numbers, checked, or words."""
    if len(column) != n:
        raise ValueError(
            f"covariates must have one row for each of the {n} samples; got {len(column)}."
        )
    kind = getattr(column, "dtype", None)
    if str(kind) == "category" or getattr(kind, "kind", "O") not in "biuf":
        return _labels(f"covariates[{name!r}]", list(column), n)
    values = np.asarray(column, dtype=np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        raise ValueError(
            f"covariates must be finite; {name!r} has NaN or infinity for {len(bad)} samples, the "
            f"first is sample {bad[0]}. Put a number in their place, or remove these samples."
        )
    return values


def _columns_of(sources: dict[str, Any]) -> tuple[tuple[Column, ...], dict[str, Any]]:
    """Return the columns that covariates become, and the categories of words."""
    columns, levels = [], {}
    for name, values in sources.items():
        words: Sequence[Hashable] = (None,)
        if not isinstance(values, np.ndarray):
            levels[name] = _sorted(values)
            words = levels[name][1:]
        for word in words:
            numbers = values if word is None else np.array([one == word for one in values], float)
            columns.append(Column(name, word, float(np.mean(numbers)), float(np.std(numbers))))
        flat = not words or columns[-1].scale <= 1e-12 * (1 + abs(columns[-1].mean))
        if flat:
            raise ValueError(
                f"covariates: {name!r} is the same for all samples, so that its effect cannot be "
                "told from the loadings. Leave it out."
            )
    return tuple(columns), levels


def _check_collinear(rows: np.ndarray, design: Design) -> None:
    """Refuse a covariate that batches, or covariates before it, tell already."""
    B = len(design.batches)
    known = rows[:, :B] if B else np.ones((len(rows), 1))
    basis = known / np.linalg.norm(known, axis=0)
    for number, column in enumerate(design.columns, B):
        rest = rows[:, number] - basis @ (basis.T @ rows[:, number])
        rest = rest - basis @ (basis.T @ rest)
        if (size := np.linalg.norm(rest)) <= COLLINEAR * np.linalg.norm(rows[:, number]):
            before = [one.name for one in design.columns[: number - B]]
            what = [*(["batches"] if B else []), *before]
            raise ValueError(
                f"covariates: {column.name!r} is a combination of {some_of(what)}, so that its "
                "effects cannot be told from theirs. Leave one of them out."
            )
        basis = np.column_stack([basis, rest / size])
