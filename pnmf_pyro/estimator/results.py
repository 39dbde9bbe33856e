"""What a fit found, in one form whichever object holds it.

Tables, scores and plots read a fit through :func:`results_of` and never ask where it came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cached_property, wraps
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.data.checks import check_array, check_counts
from pnmf_pyro.data.counts import Counts, CountsLike
from pnmf_pyro.data.design import Design
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.places import GroupCodes
from pnmf_pyro.data.tables import counts_of, is_anndata
from pnmf_pyro.training.fitted import Fitted, fitted_module, module_of
from pnmf_pyro.transforms import factor_uncertainty, get_factors, get_loadings

if TYPE_CHECKING:
    from anndata import AnnData
    from typing_extensions import TypeIs

# Where AnnData objects have their coordinates by convention.
SPATIAL_KEY = "spatial"

# Columns of the table of stages in an AnnData object.
STAGE_COLUMNS = ("name", "first", "last")


class Results(ABC):
    """Factors, loadings and places of a fit.

    Attributes
    ----------
    factors, factors_sd : ndarray of shape (n_samples, n_components)
        E exp F, and the standard deviation of exp F under q.
    log_factors_sd : ndarray of shape (n_samples, n_components)
        Standard deviation of F under q: the relative uncertainty of a factor, where it is small.
    loadings : ndarray of shape (n_features, n_components)
        W.
    elbo_history : ndarray of shape (n_iter,), or None
        ELBO at each step, in nats; None for a model that was handed over without its history.
    stages : list of (str, int, int)
        Name of each stage of the fit that trained, the number of its first step, counted from 0,
        and that after its last; empty where they are not known.
    feature_names : ndarray of str, shape (n_features,)
        Names of the features; "0", "1", ... where the data had none.
    size_factors : ndarray of shape (n_samples,)
        Size factors; 1 where the fit had none.
    coordinates : ndarray of shape (n_samples, p), or None
        Places of the samples of a spatial fit, or obsm["spatial"] of an AnnData object.
    groups : ndarray of shape (n_samples,) or (n_samples, 2), or None
        Groups of the samples of a multi-group fit: their names, or codes where there are none.
    in_space : ndarray of bool, shape (n_components,)
        Whether a component is a field over places.
    """

    factors: np.ndarray
    log_factors_sd: np.ndarray
    loadings: np.ndarray
    elbo_history: np.ndarray | None
    stages: list[tuple[str, int, int]]
    feature_names: np.ndarray
    size_factors: np.ndarray
    coordinates: np.ndarray | None
    groups: np.ndarray | None
    in_space: np.ndarray

    @property
    def n_components(self) -> int:
        """Number of components."""
        return self.loadings.shape[1]

    @property
    def factors_sd(self) -> np.ndarray:
        """Standard deviation of a log-normal: mean * sqrt(exp(sigma^2) - 1)."""
        return self.factors * np.sqrt(np.expm1(np.square(self.log_factors_sd)))

    def importance_of_space(self, per: str) -> np.ndarray:
        """Return the share of the counts expected of each sample, or feature, that is of fields."""
        factors = self.size_factors[:, None] * self.factors
        expected = self.factors if per == "sample" else self.loadings
        expected = expected * (self.loadings if per == "sample" else factors).sum(0)
        whole = expected.sum(1)
        of_fields = expected[:, self.in_space].sum(1)
        return np.divide(of_fields, whole, out=np.full(len(whole), np.nan), where=whole > 0)

    def summary(self) -> dict[str, int | str]:
        """Return what there is to say in numbers, by name."""
        found: dict[str, int | str] = {
            "samples": len(self.factors),
            "features": len(self.loadings),
            "components": self.n_components,
        }
        if self.elbo_history is not None:
            found["steps"] = len(self.elbo_history)
            found["ELBO at the last step (nats)"] = f"{self.elbo_history[-1]:.6g}"
        return found

    @abstractmethod
    def counts(self, X: Any = None) -> Any:
        """Return X itself, or, where it is None, the counts that the source keeps."""


class ModelResults(Results):
    """Results that are read off a model; `fit` is any of what holds one."""

    def __init__(self, fit: Fitted):
        self.module = fitted_module(fit, "fit")
        self.loadings = np.asarray(get_loadings(self.module))
        history = getattr(fit, "history_", getattr(fit, "history", None))
        self.elbo_history = None if history is None else np.asarray(history, dtype=np.float64)
        self.stages = getattr(history, "stages", [])
        names = getattr(fit, "feature_names_in_", range(len(self.loadings)))
        self.feature_names = np.asarray([str(name) for name in names])
        self.places = getattr(self.module.prior, "places", None)
        self.group_names = getattr(fit, "groups_", None)
        parts = self.module.prior.parts
        self.in_space = np.repeat([p.places is not None for p in parts], [p.L for p in parts])

    @cached_property
    def factors(self) -> np.ndarray:  # type: ignore[override]  # noqa: D102 - as in Results
        return np.asarray(get_factors(self.module))

    @cached_property
    def log_factors_sd(self) -> np.ndarray:  # type: ignore[override]  # noqa: D102
        return np.asarray(factor_uncertainty(self.module))

    @property
    def size_factors(self) -> np.ndarray:  # type: ignore[override]  # noqa: D102
        s = self.module.size_factors
        return np.ones(self.module.N) if s is None else s.cpu().numpy().astype(np.float64)

    @property
    def coordinates(self) -> np.ndarray | None:  # type: ignore[override]  # noqa: D102
        return None if self.places is None else self.places.coordinates.cpu().numpy()

    @property
    def groups(self) -> np.ndarray | None:  # type: ignore[override]  # noqa: D102
        if self.places is None or self.places.groups is None:
            return None
        codes = self.places.groups
        return (
            codes.cpu().numpy()
            if self.group_names is None
            else GroupCodes(self.group_names).decode(codes)
        )

    def counts(self, X: Any = None) -> Any:  # noqa: D102
        if X is None:
            raise ValueError("X must be given with a model, which does not keep it; got None.")
        return X


class AnnDataResults(Results):
    """Results that a fit wrote into an AnnData object under `key`, its `key_added`."""

    def __init__(self, adata: AnnData, key: str):
        if key not in adata.uns or f"X_{key}" not in adata.obsm:
            fits = [name for name in adata.uns if f"X_{name}" in adata.obsm]
            raise ValueError(
                f"key={key!r} is not a fit in this AnnData object; the fits in it are {fits}. Run "
                f"pnmf_pyro.fit(adata, key_added={key!r}) first."
            )
        self.adata, self.settings = adata, adata.uns[key]
        self.factors = np.asarray(adata.obsm[f"X_{key}"])
        self.log_factors_sd = np.asarray(adata.obsm[f"X_{key}_log_sd"])
        self.loadings = np.asarray(adata.varm[f"{key.upper()}_loadings"])
        history = self.settings.get("elbo_history")
        self.elbo_history = None if history is None else np.asarray(history)
        self.stages = _stages(self.settings.get("stages", {}))
        self.feature_names = np.asarray(adata.var_names, dtype=str)
        stored = adata.obs.get(f"{key}_size_factors")
        self.size_factors = np.ones(adata.n_obs) if stored is None else stored.to_numpy()
        self.coordinates = _column(adata.obsm, self.settings.get("spatial_key", SPATIAL_KEY))
        self.groups = _column(adata.obs, self.settings.get("batch_key"))
        in_space = self.settings.get("in_space", "spatial_key" in self.settings)
        self.in_space = np.broadcast_to(np.asarray(in_space, bool), self.loadings.shape[1])

    def counts(self, X: Any = None) -> Any:  # noqa: D102
        return counts_of(self.adata, self.settings.get("layer")) if X is None else X


def _stages(columns: Mapping[str, Sequence[Any]]) -> list[tuple[str, int, int]]:
    """Read the table of stages that a fit wrote; empty columns where it wrote none."""
    named = (columns.get(name, ()) for name in STAGE_COLUMNS)
    return [(str(name), int(first), int(last)) for name, first, last in zip(*named, strict=True)]


def _column(table: Any, name: str | Sequence[str] | None) -> np.ndarray | None:
    if name is not None and not isinstance(name, str):
        return table[list(name)].to_numpy() if {*name} <= {*table} else None
    return np.asarray(table[name]) if name is not None and name in table else None


Fit = Union[Results, Fitted, "AnnData"]


def results_of(fit: Fit, key: str = "pnmf") -> Results:
    """Return what a fit found; the one rule for what a fit is.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit, PoissonFactorization or Results
        A fitted estimator, an AnnData object that :func:`pnmf_pyro.fit` has written to, what
        :func:`pnmf_pyro.fit_model` returned, or a model trained in any way.
    key : str
        `key_added` of the fit, for AnnData.

    Raises
    ------
    ValueError
        For an AnnData object without such a fit, and for anything else.
    NotFittedError
        For an estimator that is not fitted.
    """
    if not is_fit(fit):
        raise ValueError(
            "fit must be a fitted PNMF, an AnnData object that pnmf_pyro.fit has written to, what "
            f"fit_model returned, or a PoissonFactorization; got {type(fit).__name__}."
        )
    if isinstance(fit, Results):
        return fit
    return AnnDataResults(fit, key) if is_anndata(fit) else ModelResults(fit)


# What holds effects, as results name it.
EFFECTS = ("batch_effects", "batch_effects_se", "covariate_effects", "covariate_effects_se")


def effects_of(exposure: Exposure, design: Design | None) -> dict[str, Any]:
    """Return what a fit publishes of effects, by name; None where it had none.

    Effects of covariates are those of one unit, on the logarithm of rates, and of one category
    against the first.
    """
    B = 0 if design is None else len(design.batches)
    found: dict[str, Any] = {
        "batches_": list(design.batches) if design and B else None,
        "covariates_": [one.name for one in design.columns] if design and design.columns else None,
    }
    for name, values in (("", exposure.effects), ("se_", exposure.errors)):
        numbers = None if values is None or design is None else values.double().cpu().numpy()
        of_batches = of_covariates = None
        if numbers is not None and design is not None:
            scales = np.array([one.scale for one in design.columns])
            of_batches = numbers[:, :B] if B else None
            of_covariates = numbers[:, B:] / scales if len(scales) else None
        found[f"batch_effects_{name}"] = of_batches
        found[f"covariate_effects_{name}"] = of_covariates
    return found


def tables_of_effects(fit: object, features: Sequence[Hashable]) -> dict[str, Any]:
    """Return data frames of effects and their standard errors, features by names of effects."""
    import pandas as pd

    tables = {}
    for kind, names in (("batch_effects", "batches_"), ("covariate_effects", "covariates_")):
        for end in ("", "_se"):
            values, columns = getattr(fit, f"{kind}{end}_", None), getattr(fit, names, None)
            if values is not None and columns is not None:
                tables[kind + end] = pd.DataFrame(values, list(features), list(map(str, columns)))
    return tables


def is_fit(thing: object) -> TypeIs[Fit]:
    """Say whether something is a fit, or an estimator that is not fitted yet."""
    known = isinstance(thing, Results) or is_anndata(thing) or hasattr(thing, "get_params")
    return known or module_of(thing) is not None


def import_optional(name: str, need: str, extra: str) -> ModuleType:
    """Import a package that not everybody needs, or say how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{need}. Install it with: pip install 'pnmf-pyro[{extra}]'") from error


def plain(value: object) -> Any:
    """Return a value as numbers, text and lists of these, which files hold.

    None stands for what has no such form, such as a generator that draws random numbers.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__array__"):  # a table of pandas
        return np.asarray(value).tolist()
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def named(value: object) -> Any:
    """Return a parameter as plain values that HDF5 holds, with names in the place of objects.

    A list with None in it becomes text.
    """
    if isinstance(value, (list, tuple)):
        return str(value) if any(one is None for one in value) else [named(one) for one in value]
    if is_dataclass(value):  # a stage
        return repr(value)
    return getattr(value, "__name__", type(value).__name__) if callable(value) else plain(value)


def counts_of_fit(X: CountsLike, shape: tuple[int, int]) -> Counts:
    """Return X as counts; raise a ValueError unless they have the fit's shape (N, D)."""
    counts = check_counts(X)
    if counts.shape != shape:
        raise ValueError(
            f"X must be the counts of the fit, of shape {shape}; got {counts.shape}. For other "
            "samples, fit them or select those of the fit."
        )
    return counts


def sample_names(X: CountsLike, n_samples: int) -> Sequence[Hashable]:
    """Return the names of the samples of X; their numbers where it has none."""
    names = getattr(X, "obs_names", getattr(X, "index", None))
    return range(n_samples) if names is None or callable(names) else list(names)


class NamesOfSamples:
    """What `set_output` makes of factors has the names of an AnnData object's samples as well.

    scikit-learn takes those of data frames alone.
    """

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)  # where scikit-learn wraps what returns factors
        for name in ("transform", "fit_transform"):
            if name in cls.__dict__:
                setattr(cls, name, _with_names_of_samples(getattr(cls, name)))


def _with_names_of_samples(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def named_as(self: object, X: CountsLike, *args: Any, **settings: Any) -> Any:
        found = method(self, X, *args, **settings)
        if is_anndata(X) and hasattr(found, "set_axis"):
            return found.set_axis(X.obs_names)
        return found

    return named_as


def chosen_numbers(name: str, chosen: ArrayLike | None, size: int) -> np.ndarray:
    """Return numbers of components, samples or features, counted from 0; all of them if None."""
    if chosen is None:
        return np.arange(size)
    numbers = check_array(name, np.atleast_1d(np.asarray(chosen)))
    whole = numbers.astype(np.int64)
    fits = numbers.ndim == 1 and len(numbers) and (whole == numbers).all()
    if not fits or (whole < 0).any() or (whole >= size).any():
        raise ValueError(f"{name} must be whole numbers from 0 to {size - 1}; got {chosen!r}.")
    return whole
